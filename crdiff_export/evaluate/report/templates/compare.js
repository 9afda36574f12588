"use strict";
// Lays two pictures of a row over each other in the dialog of compare.html; a range input divides them, so that the
// mouse, a finger and the arrow keys all move the line.
(() => {
  const byId = (id) => document.getElementById(id);
  const dialog = byId("slider"), left = byId("left"), right = byId("right"), divide = byId("divide");
  let images = [];

  const move = () => {
    byId("over").style.clipPath = `inset(0 ${100 - divide.value}% 0 0)`;
    byId("line").style.left = `${divide.value}%`;
  };
  const show = () => {
    byId("over").src = images[left.value].src;
    byId("under").src = images[right.value].src;
    byId("over").alt = images[left.value].alt;
    byId("under").alt = images[right.value].alt;
  };
  const open = (row) => {
    images = [...row.previousElementSibling.querySelectorAll("img")];
    const names = [...row.closest("table").rows[0].cells].map((cell) => cell.textContent);
    for (const [select, chosen] of [[left, 0], [right, 1]]) {
      select.replaceChildren(...names.map((name, index) => new Option(name, index, false, index === chosen)));
    }
    byId("caption").textContent = images[0].alt.slice(images[0].alt.indexOf("seed"));
    byId("stage").style.setProperty("--ratio", images[0].naturalWidth / images[0].naturalHeight);
    divide.value = 50;
    show();
    move();
    dialog.showModal();
    divide.focus();
  };

  divide.addEventListener("input", move);
  left.addEventListener("change", show);
  right.addEventListener("change", show);
  for (const button of document.querySelectorAll("button.compare")) {
    button.hidden = false;
    button.addEventListener("click", () => open(button.closest("tr")));
  }
})();
