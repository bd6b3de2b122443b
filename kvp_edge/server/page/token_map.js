// The conversation as a map: a cell for each token, in reading order. Only the visible rows are drawn,
// so that a map of many thousand tokens costs no more than one of a few hundred.

import { LOGGED, LOST } from "./levels.js";

export class TokenMap {
  #place;
  #space;
  #canvas;
  #legend;
  #levels = new Uint8Array(0);
  #back = new Uint8Array(0);
  #chosen = -1;
  #frame = 0;

  /** @param legend its swatches have the colours (style.css knows them for both themes)
   * @param onPoint called with the index of a token, and whether it was clicked */
  constructor(place, legend, onPoint) {
    this.#place = place;
    this.#space = place.querySelector("div");
    this.#canvas = place.querySelector("canvas");
    this.#legend = legend;
    place.addEventListener("scroll", () => this.#redraw(), { passive: true });
    new ResizeObserver(() => this.#redraw()).observe(place);
    const tell = (clicked) => (event) => {
      const index = this.#tokenAt(event);
      if (index >= 0) onPoint(index, clicked);
    };
    this.#canvas.addEventListener("mousemove", tell(false));
    this.#canvas.addEventListener("click", tell(true));
  }

  draw(levels, back) {
    this.#levels = levels;
    this.#back = back;
    const count = (level) => levels.reduce((n, each) => n + (each === level), 0);
    const all = levels.length;
    this.#canvas.setAttribute("aria-label", all === 0 ? "No tokens" : `${all} tokens: `
      + `${all - count(LOGGED) - count(LOST)} in cells, ${count(LOGGED)} only in the log, ${count(LOST)} lost`);
    this.#redraw();
  }

  choose(index, scroll) {
    this.#chosen = index;
    const { size, columns } = this.#layout();
    const top = Math.floor(index / columns) * size;
    const { scrollTop, clientHeight } = this.#place;
    if (scroll && (top < scrollTop || top + size > scrollTop + clientHeight)) {
      this.#place.scrollTop = top - clientHeight / 3;
    }
    this.#redraw();
  }

  /** Cells are smaller where there are many. */
  #layout() {
    const n = this.#levels.length;
    const size = n <= 800 ? 14 : n <= 4000 ? 10 : 7;
    return { size, columns: Math.max(1, Math.floor(this.#place.clientWidth / size)) };
  }

  #tokenAt(event) {
    const { size, columns } = this.#layout();
    const box = this.#canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left) / size);
    const row = Math.floor((event.clientY - box.top + this.#place.scrollTop) / size);
    const index = row * columns + column;
    return column >= 0 && column < columns && index < this.#levels.length ? index : -1;
  }

  #redraw() {
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      if (this.#place.clientHeight > 0) this.#paint();
    });
  }

  #colours() {
    const style = (level) => getComputedStyle(this.#legend.querySelector(`[data-level="${level}"]`));
    return {
      fills: Array.from({ length: 8 }, (_, level) => style(level).backgroundColor),
      log: style(LOGGED).color,
      lost: style(LOST).color,
      back: style("back").getPropertyValue("border-top-color"),
      ink: getComputedStyle(this.#place).color,
    };
  }

  #paint() {
    const { size, columns } = this.#layout();
    const { clientWidth: width, clientHeight: height } = this.#place;
    const n = this.#levels.length, scale = devicePixelRatio;
    this.#space.style.height = `${Math.max(height, Math.ceil(n / columns) * size)}px`;
    this.#canvas.width = width * scale;
    this.#canvas.height = height * scale;
    this.#canvas.style.width = `${width}px`;
    this.#canvas.style.height = `${height}px`;
    const pen = this.#canvas.getContext("2d"), colours = this.#colours();
    const top = this.#place.scrollTop, inner = size - Math.max(1, Math.round(size / 8));
    pen.setTransform(scale, 0, 0, scale, 0, -top * scale);
    const first = Math.floor(top / size) * columns;
    const end = Math.min(n, (Math.floor((top + height) / size) + 1) * columns);
    for (let i = first; i < end; i++) {
      const x = (i % columns) * size, y = Math.floor(i / columns) * size, level = this.#levels[i];
      if (level === LOST) {
        pen.strokeStyle = colours.lost;
        pen.lineWidth = 1;
        pen.beginPath();
        pen.moveTo(x + inner * 0.25, y + inner * 0.25);
        pen.lineTo(x + inner * 0.75, y + inner * 0.75);
        pen.moveTo(x + inner * 0.75, y + inner * 0.25);
        pen.lineTo(x + inner * 0.25, y + inner * 0.75);
        pen.stroke();
      } else if (level === LOGGED) {
        pen.fillStyle = colours.log;
        const dot = Math.max(2, Math.round(size / 4));
        pen.fillRect(x + (inner - dot) / 2, y + (inner - dot) / 2, dot, dot);
      } else {
        pen.fillStyle = colours.fills[level];
        pen.fillRect(x, y, inner, inner);
      }
      if (this.#back[i]) this.#outline(pen, i, x, y, size, columns, colours.back);
    }
    const i = this.#chosen;
    if (i < first || i >= end) return;
    pen.strokeStyle = colours.ink;
    pen.lineWidth = 2;
    pen.strokeRect((i % columns) * size, Math.floor(i / columns) * size, inner, inner);
  }

  /** One outline around all neighbours that came back. */
  #outline(pen, i, x, y, size, columns, colour) {
    const back = this.#back, column = i % columns, width = size > 7 ? 2 : 1.5;
    pen.fillStyle = colour;
    if (!back[i - columns]) pen.fillRect(x, y, size, width);
    if (!back[i + columns]) pen.fillRect(x, y + size - width, size, width);
    if (column === 0 || !back[i - 1]) pen.fillRect(x, y, width, size);
    if (column === columns - 1 || !back[i + 1]) pen.fillRect(x + size - width, y, width, size);
  }
}
