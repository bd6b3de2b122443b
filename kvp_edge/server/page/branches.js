// The server knows chats, each with the chat that it branched from. What a reader sees as one chat
// with several versions of a message are the chats of a family that begin with the same messages.

import { local } from "./memory.js";

/** Chats by family: [[chat, ...], ...], newest chat first in each, newest family first.
 *
 * A family are the chats that lead to the same first chat, which may have been deleted. */
export function families(chats) {
  const parents = new Map(chats.map((chat) => [chat.id, chat.parent]));
  const firstOf = (id) => {
    const met = new Set();
    while (parents.get(id) && !met.has(id)) {
      met.add(id);
      id = parents.get(id);
    }
    return id;
  };
  const found = new Map();
  for (const chat of [...chats].sort((a, b) => b.updated - a.updated)) {
    const first = firstOf(chat.id);
    if (!found.has(first)) found.set(first, []);
    found.get(first).push(chat);
  }
  return [...found.values()];
}

const MOST_ORIGINS = 300;

/** For chats that branched at their first message, which the server takes for new ones: this browser
 * remembers from which chat. */
export const origins = {
  name: "kvp-origins",
  add(id, parent) {
    const newest = [...Object.entries(local.getObject(this.name)), [id, parent]].slice(-MOST_ORIGINS);
    local.set(this.name, JSON.stringify(Object.fromEntries(newest)));
  },
  /** The same chats with their parents. */
  fill(chats) {
    const known = local.getObject(this.name);
    return chats.map((chat) => (chat.parent ? chat : { ...chat, parent: known[chat.id] ?? null }));
  },
};

const same = (a, b) => a.role === b.role && JSON.stringify(a.content ?? "") === JSON.stringify(b.content ?? "")
  && JSON.stringify(a.tool_calls ?? []) === JSON.stringify(b.tool_calls ?? []);

/** For each message of a chat: the chats that have another version of it, and where it stands
 * among them.
 *
 * @param messages of the chat that is shown.
 * @param family the chats of its family, with their messages.
 * @returns [{at, ids}] per message: `ids` has a chat for each version, oldest version first; `at`
 *   is the one that is shown. */
export function versions(messages, family) {
  let sharing = [...family].sort((a, b) => a.created - b.created);
  return messages.map((message, i) => {
    const found = []; // [message, its newest chat]
    for (const chat of sharing) {
      const theirs = chat.messages[i];
      if (theirs === undefined || theirs.role !== message.role) continue;
      const known = found.find(([version]) => same(version, theirs));
      if (known === undefined) found.push([theirs, chat]);
      else if (chat.updated > known[1].updated) known[1] = chat;
    }
    sharing = sharing.filter((chat) => chat.messages[i] && same(chat.messages[i], message));
    return {
      at: found.findIndex(([version]) => same(version, message)),
      ids: found.map(([, chat]) => chat.id),
    };
  });
}
