// Dialogs that ask for something. Each resolves to what was answered, or to null if it was closed.

import { byId, make } from "./dom.js";

/** Show a dialog until one of its buttons is pressed: resolves to that button's value ("" for one that
 * only submits), or to null. */
function ask(dialog) {
  return new Promise((resolve) => {
    const form = dialog.querySelector("form");
    const ends = new AbortController();
    const end = (value) => {
      ends.abort();
      dialog.close();
      resolve(value);
    };
    const on = (target, type, listener) => target.addEventListener(type, listener, { signal: ends.signal });
    on(form, "submit", (event) => {
      event.preventDefault(); // a page that may send no forms anywhere
      end(event.submitter?.value ?? "");
    });
    on(form, "click", (event) => {
      const button = event.target.closest("button[type=button][value]");
      if (button) end(button.value === "cancel" ? null : button.value);
    });
    on(dialog, "click", (event) => {
      if (event.target === dialog) end(null); // beside it
    });
    on(dialog, "close", () => end(null));
    if (!dialog.open) dialog.showModal();
  });
}

export const showKeys = () => ask(byId("keys"));

/** Change settings; true if they were saved. */
export async function askSettings(settings, apiKey) {
  const dialog = byId("settings"), fields = dialog.querySelector("form").elements;
  fields.system.value = settings.system;
  fields.temperature.value = settings.temperature ?? "";
  fields.max_tokens.value = settings.maxTokens ?? "";
  fields.theme.value = settings.theme;
  fields.key.value = apiKey.get();
  if ((await ask(dialog)) === null) return false;
  const number = (field) => (field.value === "" ? null : Number(field.value));
  settings.system = fields.system.value.trim();
  settings.temperature = number(fields.temperature);
  settings.maxTokens = number(fields.max_tokens);
  settings.theme = fields.theme.value;
  apiKey.set(fields.key.value.trim());
  return true;
}

let asking = null;

/** Ask for the API key, once for all requests that need it. True if there is one now. */
export function askKey(why, apiKey) {
  asking ??= (async () => {
    const dialog = byId("ask-key"), field = dialog.querySelector("input");
    byId("ask-key-why").textContent = why || "This server answers only those who have its key.";
    field.value = "";
    const answer = await ask(dialog);
    asking = null;
    if (answer === null) return false;
    apiKey.set(field.value.trim());
    return true;
  })();
  return asking;
}

/** "all", "one" (only the branch that is shown) or null. */
export async function askDelete(family, canDeleteOne) {
  const dialog = byId("delete"), n = family.length;
  const title = family[0].title?.trim() || "Untitled chat";
  byId("delete-about").replaceChildren(
    make("q", {}, title),
    n > 1 ? ` has ${n} branches. They are deleted with their logs, and cannot be brought back.`
      : " is deleted with its log, and cannot be brought back.");
  dialog.querySelector("[value=one]").hidden = n === 1 || !canDeleteOne;
  dialog.querySelector("[value=all]").textContent = n > 1 ? `Delete all ${n}` : "Delete";
  return ask(dialog);
}
