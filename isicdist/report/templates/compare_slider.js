// Each picture's slider, or a drag on the picture itself, moves the border between ground truth and prediction.
for (const picture of document.querySelectorAll(".picture")) {
  const viewer = picture.querySelector(".viewer");
  const slider = picture.querySelector("input");
  const show = () => viewer.style.setProperty("--position", `${slider.value}%`);
  slider.addEventListener("input", show);
  const drag = (event) => {
    if (event.type === "pointermove" && !(event.buttons & 1)) return;
    const box = viewer.getBoundingClientRect();
    slider.value = (100 * (event.clientX - box.left)) / box.width;
    show();
  };
  viewer.addEventListener("pointerdown", drag);
  viewer.addEventListener("pointermove", drag);
  show(); // a browser may restore a slider's value on reload
}
