// The conversation as text, each token coloured. Only what is near the visible part is laid out
// (content-visibility in style.css), and only tokens that change are touched.

import { make } from "./dom.js";
import { visible } from "./levels.js";

const CLASSES = ["lost", "log", "h1", "h2", "h3", "h4", "h5", "h6"];
const BLOCK = 120, LONGEST = 480; // tokens; a block ends with a line where it can

export class TokenText {
  #place;
  #tokens = []; // spans
  #texts = [];
  #levels = new Uint8Array(0);
  #edges = []; // see below
  #chosen = -1;

  /** @param onPoint called with the index of a token, and whether it was clicked */
  constructor(place, onPoint) {
    this.#place = place;
    const tell = (clicked) => (event) => {
      const index = event.target.index;
      if (index !== undefined) onPoint(index, clicked);
    };
    place.addEventListener("mouseover", tell(false));
    place.addEventListener("click", tell(true));
  }

  /** Whoever looks at the end sees new tokens come.
   *
   * @param texts of all tokens
   * @param levels, back see levels.js */
  draw(texts, levels, back) {
    const { scrollTop, clientHeight, scrollHeight } = this.#place;
    const follows = this.#texts.length > 0 && scrollTop + clientHeight > scrollHeight - 8;
    let same = 0;
    const most = Math.min(texts.length, this.#texts.length);
    while (same < most && texts[same] === this.#texts[same]) same++;
    this.#cut(same);
    for (let i = 0; i < same; i++) {
      if (levels[i] !== this.#levels[i] || edges(back, i) !== this.#edges[i]) this.#paint(i, levels, back);
    }
    for (let i = same; i < texts.length; i++) this.#add(texts[i], i, levels, back);
    this.#texts = texts;
    this.#levels = levels;
    if (follows && same < texts.length) this.#place.scrollTop = this.#place.scrollHeight;
  }

  /** Mark a token, and bring it into view. */
  choose(index, scroll) {
    this.#tokens[this.#chosen]?.classList.remove("chosen");
    this.#chosen = index;
    const token = this.#tokens[index];
    token?.classList.add("chosen");
    if (!scroll || !token) return;
    const here = this.#place.getBoundingClientRect(), there = token.getBoundingClientRect();
    if (there.top < here.top + 8 || there.bottom > here.bottom - 8) {
      this.#place.scrollTop += there.top - here.top - this.#place.clientHeight / 3;
    }
  }

  #paint(i, levels, back) {
    this.#edges[i] = edges(back, i);
    this.#tokens[i].className = `t ${CLASSES[levels[i]]}${this.#edges[i]}${i === this.#chosen ? " chosen" : ""}`;
  }

  #add(text, i, levels, back) {
    let block = this.#place.lastElementChild;
    const ends = block && (block.childElementCount >= LONGEST
      || (block.childElementCount >= BLOCK && block.lastElementChild.textContent.endsWith("\n")));
    if (!block || ends) block = this.#place.appendChild(make("div", { className: "block" }));
    const token = make("span", {}, /[^\n]/.test(text) ? text.replaceAll("\t", "    ") : visible(text) + text);
    token.index = i;
    this.#tokens[i] = token;
    this.#paint(i, levels, back);
    block.append(token);
  }

  #cut(length) {
    this.#edges.length = length;
    for (const token of this.#tokens.splice(length)) {
      const block = token.parentElement;
      token.remove();
      if (block.childElementCount === 0) block.remove();
    }
  }
}

/** Classes of a token that came back: an outline goes around all that came back together. */
function edges(back, i) {
  if (!back[i]) return "";
  return ` back${back[i - 1] ? "" : " first"}${back[i + 1] ? "" : " last"}`;
}
