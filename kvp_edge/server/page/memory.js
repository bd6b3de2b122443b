// What the browser remembers: `local` for good, `session` until the tab is closed. Where it is told
// to remember nothing, until the page is left.

class Memory {
  #storage = null;
  #here = new Map();

  constructor(name) {
    try {
      this.#storage = window[name];
    } catch {
      // not allowed
    }
  }

  /** null: nothing. */
  get(name) {
    return this.#here.get(name) ?? this.#storage?.getItem(name) ?? null;
  }

  /** An empty text is nothing. */
  set(name, text) {
    this.#here.delete(name);
    try {
      if (!this.#storage) throw new Error();
      if (text) this.#storage.setItem(name, text);
      else this.#storage.removeItem(name);
    } catch {
      if (text) this.#here.set(name, text); // not allowed, or full
    }
  }

  /** An object; {}: nothing, or not what this page has written. */
  getObject(name) {
    try {
      return JSON.parse(this.get(name)) ?? {};
    } catch {
      return {};
    }
  }
}

export const local = new Memory("localStorage");
export const session = new Memory("sessionStorage");
