// The list of chats at the side: one entry for each family.

import { byId, iconButton, make } from "./dom.js";

const MINUTE = 60, HOUR = 60 * MINUTE, DAY = 24 * HOUR;

/** "3 min", "2 h", "5 d", or the date. */
function age(time, now = Date.now() / 1000) {
  const seconds = Math.max(0, now - time);
  if (seconds < MINUTE) return "now";
  if (seconds < HOUR) return `${Math.floor(seconds / MINUTE)} min`;
  if (seconds < DAY) return `${Math.floor(seconds / HOUR)} h`;
  if (seconds < 30 * DAY) return `${Math.floor(seconds / DAY)} d`;
  return new Date(time * 1000).toLocaleDateString();
}

/** @param found families, see branches.js
 * @param openId the chat that is shown
 * @param remove called with the family whose button was pressed */
export function drawChatList(found, openId, remove) {
  const list = byId("chat-list");
  const focused = document.activeElement?.closest?.("#chat-list li")?.dataset.family;
  list.replaceChildren(...found.map((family) => {
    const open = family.some((chat) => chat.id === openId);
    const [newest] = family;
    const title = newest.title?.trim() || "Untitled chat";
    const about = [age(newest.updated)];
    if (family.length > 1) about.push(`${family.length} branches`);
    about.push(`${newest.n_tokens.toLocaleString()} tokens`);
    const link = make("a", { href: `./#${open ? openId : newest.id}` },
      make("span", { className: "name" }, title), make("span", { className: "quiet" }, about.join(" \u00b7 ")));
    if (open) link.setAttribute("aria-current", "page");
    return make("li", { "data-family": newest.id }, link,
      iconButton("remove", `Delete "${title}"`, () => remove(family)));
  }));
  if (focused) list.querySelector(`[data-family="${CSS.escape(focused)}"] a`)?.focus();
  byId("no-chats").hidden = found.length > 0;
}
