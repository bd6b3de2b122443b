// How a token is shown, for both views: one of eight levels.

export const LOST = 0, LOGGED = 1;
const FEWEST = 2, ALL = 7;

/** A passage came back if this share of the heads took it, or as many as took any. */
const MANY = 0.25;

/** Level of each token: lost, only in the log, or how many heads hold it: five steps, and all. */
export function levels({ held, logged, n_heads: nHeads }) {
  const found = new Uint8Array(held.length);
  for (let i = 0; i < held.length; i++) {
    if (held[i] >= nHeads) found[i] = ALL;
    else if (held[i] > 0) found[i] = FEWEST + Math.floor(((ALL - FEWEST) * held[i]) / nHeads);
    else found[i] = logged[i] ? LOGGED : LOST;
  }
  return found;
}

/** 1 for each token that the last recall brought back. */
export function recalled({ held, last_recall: recall }) {
  const found = new Uint8Array(held.length);
  if (!recall) return found;
  const least = Math.min(MANY, recall.heads.reduce((most, share) => Math.max(most, share), 0));
  const n = Math.min(held.length, recall.heads.length);
  for (let i = 0; i < n; i++) found[i] = recall.heads[i] > 0 && recall.heads[i] >= least ? 1 : 0;
  return found;
}

/** A token's text for a reader: what cannot be seen is written out. */
export function visible(text) {
  if (text === "") return "\u25af";
  const shown = text.replaceAll("\n", "\u21b5").replaceAll("\t", "\u21e5");
  return shown.trim() === "" ? shown.replaceAll(" ", "\u2423") : shown;
}

const percent = (share) => `${Math.round(100 * share)} %`;

/** What there is to say about token `i`. */
export function describe(view, i) {
  const n = view.held[i], all = view.n_heads;
  const parts = [];
  if (n > 0 && all === 1) parts.push("held");
  else if (n > 0) parts.push(`held by ${n === all ? `all ${all}` : `${n} of ${all}`} heads`);
  if (n > 0 && n < all) parts.push(view.logged[i] ? "in the log for the others" : "lost for the others");
  if (n === 0) parts.push(view.logged[i] ? "only in the log" : "lost: it cannot come back");
  const share = view.last_recall?.heads[i] ?? 0;
  if (share > 0) parts.push(all === 1 ? "came back" : `came back to ${percent(share)} of the heads`);
  return parts.join("; ");
}
