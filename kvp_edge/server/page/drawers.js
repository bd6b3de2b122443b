// The panels at both sides. Beside the chat where there is room, otherwise drawers in front of it.

import { byId } from "./dom.js";

export class Drawer {
  #panel;
  #button;
  #narrow;
  #onChange;
  #isOpen; // in front of the chat, where there is no room beside it
  #shown; // where there is room

  /** @param query when the panel is a drawer
   * @param shown whether it is shown where there is room
   * @param onChange called with whether the panel can be seen, and whether as a drawer */
  constructor(panelId, buttonId, query, shown, onChange) {
    this.#panel = byId(panelId);
    this.#button = byId(buttonId);
    this.#narrow = matchMedia(query);
    this.#onChange = onChange;
    this.#isOpen = false;
    this.#shown = shown;
    this.#narrow.addEventListener("change", () => { this.#isOpen = false; this.#draw(); });
    this.#button.addEventListener("click", () => this.toggle());
    this.#panel.querySelector(".close").addEventListener("click", () => this.close());
    byId("shade").addEventListener("click", () => this.closeDrawer());
    this.#draw();
  }

  get isDrawer() {
    return this.#narrow.matches;
  }

  get visible() {
    return this.isDrawer ? this.#isOpen : this.#shown;
  }

  toggle() {
    if (this.isDrawer) this.#isOpen = !this.#isOpen;
    else this.#shown = !this.#shown;
    this.#draw();
    if (this.visible && this.isDrawer) this.#panel.querySelector(".close").focus();
  }

  /** Close the drawer, or hide the panel. False if it could not be seen anyway. */
  close() {
    if (!this.visible) return false;
    const had = this.#panel.contains(document.activeElement);
    if (this.isDrawer) this.#isOpen = false;
    else this.#shown = false;
    this.#draw();
    if (had) this.#button.focus();
    return true;
  }

  /** Close it if it is in front of the chat. */
  closeDrawer() {
    return this.isDrawer && this.close();
  }

  #draw() {
    this.#panel.classList.toggle("open", this.visible);
    this.#panel.inert = !this.visible;
    this.#button.setAttribute("aria-expanded", this.visible);
    this.#panel.classList.toggle("drawer", this.isDrawer);
    const covers = document.querySelector(".side.open.drawer") !== null;
    byId("shade").hidden = !covers;
    byId("main").inert = covers;
    this.#onChange(this.visible, this.isDrawer);
  }
}
