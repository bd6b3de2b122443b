// What the server says of its cache, again and again while a reply is written.

import * as api from "./api.js";

const IDLE_MS = 5000, WRITING_MS = 400;

/** After a reply the server finds out which words asked; so many times it is asked soon again. */
const SOON = 4, SOON_MS = 700;

/** Follows the cache as long as somebody can see it. */
export class CacheFeed {
  #onView;
  #onError;
  #chat = null;
  #watched = false;
  #writing = false;
  #wake = () => {};
  #known = { chat: null, texts: [] };
  #soon = 0;
  #whole = true; // ask for all texts next

  constructor(onView, onError) {
    this.#onView = onView;
    this.#onError = onError;
    document.addEventListener("visibilitychange", () => this.#wake());
    this.#run();
  }

  /** Whether the panel is open. */
  watch(watched) {
    this.#watched = watched;
    this.#wake();
  }

  /** Which chat is open (null: a new one), and whether its reply is being written. */
  follow(chat, writing) {
    if (this.#writing && !writing) {
      this.#whole = true; // what was written may be in other tokens now
      this.#soon = SOON;
    }
    this.#chat = chat;
    this.#writing = writing;
    this.#wake();
  }

  async #run() {
    for (;;) {
      let pause = IDLE_MS;
      if (this.#watched && !document.hidden) {
        const start = performance.now();
        try {
          const view = await this.#ask();
          // a long conversation takes longer to answer: it may not keep the server from writing
          const took = performance.now() - start;
          if (view.writing || this.#writing) pause = Math.max(WRITING_MS, 8 * took);
          else if (this.#soon-- > 0) pause = Math.max(SOON_MS, 8 * took);
          this.#onView(view);
        } catch (error) {
          this.#onError(error);
        }
      } else {
        pause = null;
      }
      await this.#sleep(pause);
    }
  }

  /** Until `wake` is called, or for so many milliseconds. */
  #sleep(ms) {
    return new Promise((resolve) => {
      const timer = ms === null ? 0 : setTimeout(resolve, ms);
      this.#wake = () => { clearTimeout(timer); resolve(); };
    });
  }

  async #ask() {
    const known = this.#known, asked = this.#chat ?? known.chat;
    const from = this.#whole || asked !== known.chat ? 0 : known.texts.length;
    this.#whole = false;
    const view = await api.cache(asked, from);
    const start = view.texts_from ?? 0;
    const goesOn = view.chat === known.chat && start <= known.texts.length;
    const texts = goesOn ? known.texts.slice(0, start).concat(view.texts) : view.texts;
    this.#known = { chat: view.chat, texts };
    return { ...view, texts };
  }
}
