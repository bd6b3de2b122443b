// The panel beside the chat: what the cache holds, and what came back.

import { byId, make } from "./dom.js";
import { describe, levels, recalled, visible } from "./levels.js";
import { TokenMap } from "./token_map.js";
import { TokenText } from "./token_text.js";

const MOST_WORDS = 6;

const count = (n) => n.toLocaleString("en");
const mib = (bytes) => `${(bytes / 2 ** 20).toFixed(bytes < 100 * 2 ** 20 ? 1 : 0)} MiB`;
const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;

export class CachePanel {
  #view = null;
  #mode;
  #text;
  #map;
  #chosen = -1; // the token that was clicked, or that the slider stands at
  #slider = byId("token");

  /** @param mode "text" or "map"
   * @param onMode called when the reader chose another */
  constructor(mode, onMode) {
    const point = (index, clicked) => (clicked ? this.choose(index, false) : this.#read(index));
    this.#text = new TokenText(byId("token-text"), point);
    this.#map = new TokenMap(byId("token-map"), byId("legend"), point);
    this.#mode = mode;
    for (const choice of document.querySelectorAll("input[name=view]")) {
      choice.checked = choice.value === mode;
      choice.addEventListener("change", () => {
        this.#mode = choice.value;
        this.#drawTokens();
        if (this.#chosen >= 0) this.choose(this.#chosen);
        onMode(this.#mode);
      });
    }
    this.#slider.addEventListener("input", () => this.choose(Number(this.#slider.value)));
    for (const id of ["token-text", "token-map"]) {
      byId(id).addEventListener("keydown", (event) => this.#step(event));
      byId(id).addEventListener("mouseleave", () => this.#read(this.#chosen));
    }
  }

  /** @param view of GET /kvp/cache, with the texts of all tokens
   * @param openChat id of the chat that is shown
   * @param title of the chat that is in the cells */
  draw(view, openChat, title) {
    this.#view = view;
    this.#drawNotice(view, openChat, title);
    this.#drawAmounts(view);
    this.#drawRecall(view);
    const one = view.n_heads === 1; // a token stays or goes in all heads at once
    byId("legend").classList.toggle("single", one);
    byId("many").textContent = one ? "held" : `all ${view.n_heads} heads`;
    this.#drawTokens();
    const last = Math.max(0, view.held.length - 1);
    this.#slider.max = last;
    this.#slider.disabled = view.held.length === 0;
    if (this.#chosen > last) this.#chosen = -1;
    if (this.#chosen >= 0) this.#read(this.#chosen);
  }

  /** The colours have changed. */
  redraw() {
    if (this.#view) this.#drawTokens();
  }

  say(notice) {
    byId("cache-notice").textContent = notice;
    byId("cache-notice").hidden = notice === "";
  }

  /** Mark a token, and bring it into view. */
  choose(index, scroll = true) {
    this.#chosen = index;
    this.#slider.value = index;
    (this.#mode === "text" ? this.#text : this.#map).choose(index, scroll);
    this.#read(index);
  }

  #step(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step === undefined || !this.#view || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    const n = this.#view.held.length;
    if (n > 0) this.choose(Math.min(n - 1, Math.max(0, this.#chosen + step)));
  }

  #read(index) {
    const view = this.#view, about = byId("token-about");
    if (!view || index < 0 || index >= view.held.length) {
      about.textContent = "Point at a token, or move the slider, to read about it.";
      return;
    }
    const said = describe(view, index), text = visible(view.texts[index] ?? "");
    about.replaceChildren(make("code", {}, text), ` token ${count(index)}: ${said}`);
    this.#slider.setAttribute("aria-valuetext", `${index}, ${text}, ${said}`);
  }

  #drawNotice({ chat, held, stats, writing }, openChat, title) {
    let notice = "";
    if (held.length > 0 && chat !== openChat && !(writing && openChat === null)) {
      notice = `These are the cells of another chat${title ? `, \u201c${title}\u201d` : ""}.`;
      if (openChat !== null) notice += " This one comes back to them with its next message.";
    } else if (stats.policy === null) {
      notice = "This cache has no budget: it holds every token until it is full.";
    }
    this.say(notice);
  }

  #drawAmounts({ stats, tokens_per_second: speed }) {
    byId("cells-used").textContent = `${count(stats.kept)} of ${count(stats.cells)} cells`;
    byId("cells-size").textContent = mib(stats.kv_bytes)
      + (stats.kv_type === "f16" ? "" : ` ${stats.kv_type}`);
    byId("cells").max = Math.max(1, stats.cells);
    byId("cells").value = stats.kept;
    const numbers = {
      "seen": count(stats.seen),
      "kept": count(stats.kept),
      "in the log": count(stats.logged),
      "log": mib(stats.log_bytes),
      "lost": count(stats.lost),
      "recalled": count(stats.recalled),
      "evictions": count(stats.evictions),
      "tokens/s": speed === null ? "\u2013" : speed.toFixed(1),
    };
    const place = byId("numbers");
    if (place.childElementCount === 0) {
      for (const name of Object.keys(numbers)) place.append(make("div", {}, make("dt", {}, name), make("dd")));
    }
    Object.values(numbers).forEach((value, i) => {
      const shown = place.children[i].lastChild;
      if (shown.textContent !== value) shown.textContent = value;
    });
  }

  #drawRecall({ last_recall: recall }) {
    const section = byId("recall");
    section.hidden = !recall;
    const drawn = JSON.stringify(recall && [recall.n_rows, recall.share, recall.asked_by, recall.spans]);
    if (!recall || section.drawn === drawn) return;
    section.drawn = drawn;
    byId("recall-about").textContent = `${count(recall.n_tokens)} tokens in each head \u00b7 `
      + `${percent(recall.share)} of attention \u00b7 ${recall.ms.toFixed(0)} ms`;
    const words = [...recall.asked_by].sort((a, b) => b.attention - a.attention).slice(0, MOST_WORDS);
    const most = Math.max(1e-9, ...words.map((word) => word.attention));
    byId("asked").replaceChildren(...words.map(({ text, attention, index }) => {
      const bar = make("span", { className: "weight" });
      bar.style.width = `${(100 * attention) / most}%`;
      return make("li", {}, make("button", { type: "button", onclick: () => this.choose(index) },
        make("span", { className: "word" }, visible(text.trim())), make("span", { className: "quiet" }, percent(attention)),
        make("span", { className: "track", "aria-hidden": "true" }, bar)));
    }));
    byId("passages").replaceChildren(...recall.spans.map(({ start, end, text }) =>
      make("li", {}, make("button", { type: "button", onclick: () => this.#showPassage(start) },
        make("span", { className: "excerpt" }, visible(text.trim())),
        make("span", { className: "quiet" }, end - start === 1 ? count(start) : `${count(start)}\u2013${count(end - 1)}`)))));
    byId("passages-title").hidden = recall.spans.length === 0;
    byId("asked-title").hidden = words.length === 0;
  }

  #showPassage(start) {
    byId("tokens").scrollIntoView({ block: "nearest" });
    this.choose(start);
  }

  #drawTokens() {
    const isText = this.#mode === "text";
    byId("token-text").hidden = !isText;
    byId("token-map").hidden = isText;
    if (!this.#view) return;
    const shown = levels(this.#view), back = recalled(this.#view);
    if (isText) this.#text.draw(this.#view.texts.slice(0, shown.length), shown, back);
    else this.#map.draw(shown, back);
  }
}
