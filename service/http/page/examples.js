// Texts to begin with.

const EXAMPLES = {
  ag_news: [
    ["A hard one", "UN says rebels used satellite phones to plan the raid"],
    ["An easy one", "The striker scored twice as the home side won the final."],
    ["In between", "NASA budget cut sends shares of rocket maker lower."],
    ["Two sides", "Club owner sells his airline to pay for new stadium"],
  ],
  imdb: [
    ["A hard one", "I wanted to like it. The photography is lovely and the first hour works, but then nobody seems to know why we are here."],
    ["An easy one", "A wonderful film: warm, funny and beautifully played."],
    ["In between", "Not bad, for a film that nobody asked for."],
  ],
  banking77: [
    ["A hard one", "The machine kept it and I still see money missing"],
    ["An easy one", "I need to change my PIN"],
    ["In between", "My card has not arrived yet."],
    ["Hardly a hint", "It did not work again"],
  ],
};

const ANY = [
  ["Short", "Good morning."],
  ["Longer", "After three long days in the rain, nobody could say any more who had begun it, or why it mattered so much."],
];

export const examplesOf = model => EXAMPLES[model] ?? ANY;
