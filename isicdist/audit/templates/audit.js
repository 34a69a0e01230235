// Verdicts by keyboard or radio button; they stay in this browser until they are saved as a table.
"use strict";
const cards = [...document.querySelectorAll(".card")];
const storageName = `isicdist-audit-${document.body.dataset.digest}`;

function restore() {
  try {
    return JSON.parse(localStorage.getItem(storageName)) ?? {};
  } catch {
    return {};  // a browser may refuse storage to a file; then the verdicts last as long as the page
  }
}

const verdicts = restore();

function show(card) {
  const verdict = verdicts[card.dataset.key] ?? "";
  card.dataset.verdict = verdict;
  for (const radio of card.querySelectorAll("input")) radio.checked = radio.value === verdict;
}

function showProgress() {
  const given = cards.map((card) => card.dataset.verdict).filter(Boolean);
  const wrong = given.filter((verdict) => verdict === "wrong").length;
  document.getElementById("progress").textContent = `${given.length} of ${cards.length} looked at, ${wrong} wrong`;
}

function decide(card, verdict) {
  verdicts[card.dataset.key] = verdict;
  show(card);
  showProgress();
  try {
    localStorage.setItem(storageName, JSON.stringify(verdicts));
  } catch {
    // As above.
  }
}

function focusCard(index) {
  const card = cards[Math.max(0, Math.min(index, cards.length - 1))];
  card?.focus({ preventScroll: true });
  card?.scrollIntoView({ block: "start" });
}

function currentIndex() {
  return cards.findIndex((card) => card.contains(document.activeElement));
}

function cell(text) {
  return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function save() {
  const columns = ["rank", "id", "split", "score", "reason", document.body.dataset.column];
  const rows = cards.map(({ dataset }) =>
    [dataset.rank, dataset.key, dataset.split, dataset.score, dataset.reason, dataset.verdict].map(cell).join(","),
  );
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([`${columns.join(",")}\n${rows.join("\n")}\n`], { type: "text/csv" }));
  link.download = "verdicts.csv";
  link.click();
  URL.revokeObjectURL(link.href);
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const key = event.key.toLowerCase();
  const index = currentIndex();
  const radio = index >= 0 && cards[index].querySelector(`[data-shortcut="${CSS.escape(key)}"]`);
  if (radio) {
    decide(cards[index], radio.value);
    focusCard(index + 1);
  } else if (key === "arrowdown") {
    focusCard(index + 1);
  } else if (key === "arrowup") {
    focusCard(index - 1);
  } else if (key === "h") {
    document.body.classList.toggle("no-outlines");
  } else if (key === "s") {
    save();
  } else {
    return;
  }
  event.preventDefault();
});

for (const card of cards) {
  card.addEventListener("change", (event) => decide(card, event.target.value));
  show(card);
}
showProgress();
document.getElementById("save").addEventListener("click", save);
if (cards.some((card) => card.dataset.verdict)) {
  focusCard(cards.findIndex((card) => !card.dataset.verdict));
} else {
  cards[0]?.focus({ preventScroll: true }); // the first visit begins with the explanation above the cards
}
