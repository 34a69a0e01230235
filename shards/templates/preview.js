// Show the samples whose split is checked and that have the chosen flag.
const form = document.querySelector("form");
const tiles = [...document.querySelectorAll(".tile")];
const filter = () => {
  const chosen = new FormData(form);
  const splits = chosen.getAll("split");
  const flag = chosen.get("flag") ?? ""; // a page without flags has no choice of them
  for (const tile of tiles) {
    const flags = tile.dataset.flags.split(" ");
    tile.hidden = !splits.includes(tile.dataset.split) || (flag !== "" && !flags.includes(flag));
  }
  const shown = tiles.filter((tile) => !tile.hidden).length;
  document.querySelector("[role=status]").textContent = `${shown} of ${tiles.length} samples`;
};
form.addEventListener("change", filter);
filter(); // a browser may restore the form on reload
