// The page: which chat is open, and who is told when something changes.

import * as api from "./api.js";
import { families, origins, versions } from "./branches.js";
import { CacheFeed } from "./cache_feed.js";
import { CachePanel } from "./cache_panel.js";
import { drawChatList } from "./chat_list.js";
import { Conversation, textOf } from "./conversation.js";
import { askDelete, askKey, askSettings, showKeys } from "./dialogs.js";
import { announce, byId, drawIcons, icon } from "./dom.js";
import { Drawer } from "./drawers.js";
import { session } from "./memory.js";
import { isDark, requestOptions, save, settings } from "./settings.js";
import { fitHeight, sends, Thread } from "./thread.js";

const message = byId("message");
let model = null;
let chats = []; // as the server lists them
let open = null; // the Conversation that is shown
let shown = 0; // how many conversations were shown: one that comes late is not
const writing = new Set(); // Conversations that wait for replies or get them, shown or not

api.key.askWith((why) => askKey(why, api.key));
drawIcons();

const thread = new Thread({
  open: (id) => openChat(id),
  retry: () => reply(open),
  again: (index) => branch(open.messages.slice(0, index)),
  edit: (index, text) => branch([...open.messages.slice(0, index), { role: "user", content: text }]),
});
const panel = new CachePanel(settings.view, (view) => { settings.view = view; save(); });
const feed = new CacheFeed(
  (view) => panel.draw(view, open?.id ?? null, chats.find((chat) => chat.id === view.chat)?.title),
  (error) => panel.say(error.message),
);
const list = new Drawer("chats", "open-chats", "(max-width: 760px)", true, () => {});
const cache = new Drawer("cache", "open-cache", "(max-width: 1120px)", settings.cache, (visible, isDrawer) => {
  feed.watch(visible);
  if (!isDrawer && settings.cache !== visible) {
    settings.cache = visible;
    save();
  }
});

// -- chats -------------------------------------------------------------------------------------

/** Show a conversation; `how` is what becomes of the page's address. */
function show(conversation, how) {
  shown++;
  open = conversation;
  if (how !== "keep") {
    const address = open.id ? `#${open.id}` : location.pathname + location.search;
    history[how === "push" ? "pushState" : "replaceState"](null, "", address);
  }
  message.value = draft.get();
  fitHeight(message);
  byId("problems").replaceChildren();
  thread.open(open);
  drawAround();
  feed.follow(open.id, open.writing);
}

/** What was typed and not sent is there again after a reload. */
const draft = {
  name: () => `kvp-draft ${open?.id ?? ""}`,
  get: () => session.get(draft.name()) ?? "",
  set: (text) => session.set(draft.name(), text),
};

/** A conversation in which nothing was said. */
function fresh() {
  const messages = settings.system ? [{ role: "system", content: settings.system }] : [];
  return new Conversation(changed, { messages });
}

function newChat() {
  show(fresh(), "push");
  list.closeDrawer();
  message.focus();
}

/** Open a chat of the server's; a new one if it is not there any more. */
async function openChat(id, how = "push") {
  list.closeDrawer();
  let conversation = [...writing].find((each) => each.id === id);
  if (!conversation) {
    const before = ++shown;
    try {
      const { messages } = await api.chat(id);
      if (shown !== before) return;
      conversation = new Conversation(changed, { id, messages });
    } catch (error) {
      if (error.status !== 404) return say(error.message, () => openChat(id, how));
      show(fresh(), "replace");
      return say("This chat is not on the server any more.");
    }
  }
  show(conversation, how);
  await findVersions(conversation);
}

/** A chat that goes on differently from here. */
function branch(messages) {
  if (writing.has(open)) return;
  show(new Conversation(changed, { messages, origin: open.id ?? open.origin }), "keep");
  reply(open);
  message.focus();
}

/** Whether that succeeded; otherwise the reader may try `again`. */
async function listChats(again = listChats) {
  try {
    chats = origins.fill(await api.chats());
  } catch (error) {
    if (open.error === null) say(error.message, again); // otherwise that has been said
    return false;
  }
  drawAround();
  return true;
}

const known = new Map(); // chat id -> {updated, messages}, of families that were looked at

/** Look for other versions of the conversation's messages. */
async function findVersions(conversation) {
  const family = families(chats).find((each) => each.some((chat) => chat.id === conversation.id));
  if (!family || family.length < 2) {
    conversation.versions = [];
    return;
  }
  const whole = await Promise.all(family.map(async (chat) => {
    if (known.get(chat.id)?.updated !== chat.updated) {
      try {
        known.set(chat.id, { updated: chat.updated, messages: (await api.chat(chat.id)).messages });
      } catch {
        return null; // deleted meanwhile
      }
    }
    return { ...chat, messages: known.get(chat.id).messages };
  }));
  conversation.versions = versions(conversation.messages, whole.filter((chat) => chat !== null));
  if (conversation === open) thread.draw();
}

async function removeFamily(family) {
  const isOpen = family.some((chat) => chat.id === open.id);
  const answer = await askDelete(family, isOpen);
  if (answer === null) return;
  const gone = answer === "one" ? family.filter((chat) => chat.id === open.id) : family;
  for (const chat of gone) {
    [...writing].find((each) => each.id === chat.id)?.stop();
    try {
      await api.deleteChat(chat.id);
    } catch (error) {
      if (error.status !== 404) return say(error.message, () => removeFamily(family));
    }
  }
  await listChats();
  message.focus(); // the button that was pressed is gone
  const left = family.find((chat) => !gone.includes(chat));
  if (!gone.some((chat) => chat.id === open.id)) return;
  if (left) await openChat(left.id, "replace");
  else show(fresh(), "replace");
  announce("Deleted.");
}

// -- replies -----------------------------------------------------------------------------------

async function send() {
  const text = message.value.trim();
  if (text === "" || writing.has(open)) return;
  draft.set("");
  message.value = "";
  fitHeight(message);
  // what was refused would be refused again: the new message takes its place
  const before = open.refused && open.unanswered ? open.messages.slice(0, -1) : open.messages;
  open.messages = [...before, { role: "user", content: text }];
  await reply(open);
}

async function reply(conversation) {
  if (writing.has(conversation)) return;
  byId("problems").replaceChildren();
  thread.goToEnd();
  announce("The reply is being written.");
  writing.add(conversation);
  await nameModel();
  await conversation.reply({ ...(model ? { model } : {}), ...requestOptions() });
}

/** Requests name the model, and so does the page. */
async function nameModel() {
  try {
    model ??= await api.model();
    byId("model").textContent = model;
  } catch {
    // the next request says what is wrong
  }
}

/** Called by conversations. */
function changed(conversation, what) {
  if (what !== "text" && !conversation.writing) writing.delete(conversation);
  if (conversation.error !== null) model = null; // another server may be there next time
  if (what === "settled") {
    listChats().then(() => findVersions(conversation));
  }
  if (what === "id" && conversation.origin) origins.add(conversation.id, conversation.origin);
  if (conversation !== open) return;
  if (what === "text") return thread.grow();
  if (what === "id") {
    history.replaceState(null, "", `#${open.id}`);
    session.set("kvp-draft ", ""); // what is typed meanwhile belongs to this chat
    draft.set(message.value);
    listChats();
  } else {
    thread.draw();
  }
  if (what === "settled") announce(ending(open));
  feed.follow(open.id, open.writing);
  drawAround();
}

/** What is said aloud when a reply ends; a long one is left to be read. */
function ending({ error, finish, messages }) {
  if (error !== null) return ""; // an alert says it
  if (finish === "stopped") return "Stopped.";
  const text = textOf(messages.at(-1));
  return text.length <= 500 ? `Reply: ${text}` : "The reply is complete.";
}

// -- around the chat ---------------------------------------------------------------------------

function drawAround() {
  if (!open) return;
  drawChatList(families(chats), open.id, removeFamily);
  const first = open.messages.find((each) => each.role === "user");
  const title = first ? textOf(first).trim().slice(0, 200) : "New chat";
  byId("title").textContent = title;
  document.title = first ? `${title} \u00b7 kvp-edge` : "kvp-edge";
  const had = document.activeElement === byId("stop") || document.activeElement === byId("send");
  byId("send").hidden = open.writing;
  byId("stop").hidden = !open.writing;
  if (had) message.focus();
}

/** A sentence below the messages, with "try again" if there is something to try. */
function say(text, retry = null) {
  const note = document.createElement("div");
  note.className = "note error";
  note.setAttribute("role", "alert");
  const sentence = document.createElement("p");
  sentence.textContent = text;
  note.append(sentence);
  if (retry) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(icon("again"), "Try again");
    button.addEventListener("click", () => {
      note.remove();
      retry();
    });
    note.append(button);
  }
  byId("problems").replaceChildren(note);
}

function drawTheme() {
  const dark = isDark(), button = byId("switch-theme");
  button.replaceChildren(icon(dark ? "sun" : "moon"));
  button.ariaLabel = button.title = dark ? "Light theme" : "Dark theme";
  panel.redraw();
}

async function changeSettings() {
  if (!(await askSettings(settings, api.key))) return;
  save();
  drawTheme();
  if (open.id === null && !open.messages.some((each) => each.role === "user")) newChat();
}

byId("chat-list").addEventListener("click", (event) => {
  const link = event.target.closest("a");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return; // another tab or window
  event.preventDefault(); // the address may be this one already, of a branch that failed
  const id = link.hash.slice(1);
  if (id === open.id) list.closeDrawer();
  else openChat(id);
});
byId("new-chat").addEventListener("click", newChat);
byId("open-settings").addEventListener("click", changeSettings);
byId("open-keys").addEventListener("click", showKeys);
byId("switch-theme").addEventListener("click", () => {
  settings.theme = isDark() ? "light" : "dark";
  save();
  drawTheme();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawTheme);
byId("stop").addEventListener("click", () => open.stop());
byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
message.addEventListener("input", () => {
  fitHeight(message);
  draft.set(message.value);
});
message.addEventListener("keydown", (event) => {
  if (sends(event)) {
    event.preventDefault();
    send();
  } else if (event.key === "ArrowUp" && message.value === "" && thread.editLast()) {
    event.preventDefault();
  }
});
document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]")) return;
  const typing = event.target.matches("input:not([type=range], [type=radio]), textarea");
  const command = event.ctrlKey || event.metaKey;
  if (event.key === "Escape") {
    if (!event.isComposing && !cache.closeDrawer() && !list.closeDrawer() && !thread.stopEditing()) open.stop();
  } else if (command && event.key === "k") newChat();
  else if (command && event.key === ",") changeSettings();
  else if (!typing && !command && event.key === "?") showKeys();
  else if (!typing && !command && event.key === "/") message.focus();
  else return;
  event.preventDefault();
});
window.addEventListener("popstate", () => {
  const id = location.hash.slice(1);
  if (id !== (open.id ?? "")) (id ? openChat(id, "keep") : show(fresh(), "keep"));
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && !open.writing) listChats();
});

// -- begin -------------------------------------------------------------------------------------

/** What only the server knows; without an answer the reader may try again. */
async function begin() {
  if (!(await listChats(begin))) return;
  if (location.hash.length > 1) await openChat(location.hash.slice(1), "keep");
  await nameModel();
}

drawTheme();
show(fresh(), "keep");
if (matchMedia("(pointer: fine)").matches) message.focus();
await begin();
