// Renders $...$ and $$...$$, again after each instant navigation.
document$.subscribe(({ body }) =>
  renderMathInElement(body, {
    delimiters: [
      { left: "$$", right: "$$", display: true },
      { left: "\\(", right: "\\)", display: false },
      { left: "\\[", right: "\\]", display: true },
    ],
  })
);
