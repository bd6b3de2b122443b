// What the reader has chosen. It stays in this browser; the API key does not (api.js).

import { local } from "./memory.js";

const NAME = "kvp-settings", THEME = "kvp-theme";
const DEFAULTS = { system: "", temperature: null, maxTokens: null, view: "text", cache: true };

/** system, temperature, maxTokens (null: the server's), view ("text" or "map"), cache (whether it is
 * shown), theme ("", "light" or "dark"). Call `save` after a change. */
export const settings = { ...DEFAULTS, ...local.getObject(NAME), theme: local.get(THEME) ?? "" };

export function save() {
  const { theme, ...others } = settings;
  local.set(NAME, JSON.stringify(others));
  local.set(THEME, theme); // theme.js reads it
  document.documentElement.dataset.theme = theme;
}

/** Whether the page is dark now. */
export const isDark = () =>
  settings.theme === "dark" || (settings.theme === "" && matchMedia("(prefers-color-scheme: dark)").matches);

/** Fields of a request. */
export function requestOptions() {
  const options = {};
  if (settings.temperature !== null) options.temperature = settings.temperature;
  if (settings.maxTokens !== null) options.max_tokens = settings.maxTokens;
  return options;
}
