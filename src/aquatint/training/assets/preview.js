const field = document.getElementById("filter");
const cards = [...document.querySelectorAll("article")];
field.addEventListener("input", () => {
  const words = field.value.toLowerCase().trim();
  for (const card of cards) card.hidden = !card.dataset.words.includes(words);
  document.getElementById("count").textContent = cards.filter((card) => !card.hidden).length;
});
