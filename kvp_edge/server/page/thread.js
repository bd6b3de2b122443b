// The messages of the open chat, and what can be done with each.

import { textOf } from "./conversation.js";
import { byId, icon, iconButton, make } from "./dom.js";
import { copyButton, render } from "./markdown.js";

const scroller = byId("scroller"), place = byId("messages"), notices = byId("notices"), toEnd = byId("to-end");

/** A message of the user's with more characters is folded: texts are pasted to ask about them. */
const LONG = 1200;

const WHO = { user: "You", assistant: "Reply", system: "System prompt", tool: "Result of a tool" };

export class Thread {
  #actions;
  #conversation = null;
  #editing = null; // {index, text} of the message in an editor
  #atEnd = true;
  #frame = 0;
  #unfolded = new WeakSet(); // long messages that are shown whole

  /** @param actions {edit(index, text), again(index), open(id), retry()} */
  constructor(actions) {
    this.#actions = actions;
    scroller.addEventListener("scroll", () => this.#noticeScroll(), { passive: true });
    toEnd.addEventListener("click", () => this.goToEnd());
    new ResizeObserver(() => this.#follow()).observe(place);
  }

  /** Show another conversation. */
  open(conversation) {
    this.#conversation = conversation;
    this.#editing = null;
    this.#atEnd = true;
    this.draw();
    this.goToEnd();
  }

  draw() {
    const { messages, writing } = this.#conversation;
    const focused = document.activeElement?.closest?.("#messages article")?.index;
    place.replaceChildren(...messages.map((_, i) => this.#message(i)));
    if (writing && this.#conversation.unanswered) {
      place.append(make("article", { className: "message assistant waiting", "aria-label": "Reply" },
        make("p", { className: "quiet" }, "Reading\u2026")));
    }
    if (messages.length === 0) place.append(welcome());
    place.setAttribute("aria-busy", writing);
    this.#drawNotices();
    if (focused !== undefined && document.activeElement === document.body) {
      place.children[Math.min(focused, place.children.length - 1)]?.querySelector("textarea, button")?.focus();
    }
    this.#follow();
  }

  /** The last message has grown. */
  grow() {
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      const last = place.lastElementChild;
      const index = this.#conversation.messages.length - 1;
      if (last?.index === index && this.#conversation.messages[index].role === "assistant") {
        render(last.querySelector(".body"), textOf(this.#conversation.messages[index]));
        this.#follow();
      }
    });
  }

  /** Put the last message of the user into an editor; false if there is none. */
  editLast() {
    const { messages, writing } = this.#conversation;
    const index = messages.findLastIndex((message) => message.role === "user");
    if (index < 0 || writing) return false;
    this.#edit(index);
    return true;
  }

  /** Whether there was an editor to close. */
  stopEditing() {
    if (this.#editing === null) return false;
    const { index } = this.#editing;
    this.#editing = null;
    this.draw();
    place.children[index]?.querySelector("[data-action=edit]")?.focus();
    return true;
  }

  goToEnd() {
    this.#atEnd = true;
    this.#follow();
  }

  #follow() {
    if (this.#atEnd) scroller.scrollTop = scroller.scrollHeight;
    toEnd.hidden = this.#atEnd;
  }

  #noticeScroll() {
    this.#atEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 48;
    toEnd.hidden = this.#atEnd;
  }

  #edit(index) {
    this.#editing = { index, text: textOf(this.#conversation.messages[index]) };
    this.draw();
    const area = place.children[index].querySelector("textarea");
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }

  #message(index) {
    const message = this.#conversation.messages[index];
    const { writing, messages } = this.#conversation;
    const body = make("div", { className: "body" });
    const article = make("article", {
      className: `message ${message.role}`, index, "aria-label": WHO[message.role] ?? message.role,
    });
    if (this.#editing?.index === index) {
      article.append(this.#editor());
      return article;
    }
    if (message.role === "system" || message.role === "tool") {
      article.append(make("details", {}, make("summary", {}, WHO[message.role]), body));
      body.textContent = textOf(message);
      return article;
    }
    if (message.role === "assistant") render(body, textOf(message));
    else body.textContent = textOf(message);
    const isLong = message.role === "user" && body.textContent.length > LONG;
    for (const call of message.tool_calls ?? []) {
      body.append(make("p", { className: "quiet" }, "Asks for a tool: ",
        make("code", {}, `${call.function?.name}(${call.function?.arguments})`)));
    }
    article.append(body);
    const grows = writing && index === messages.length - 1 && message.role === "assistant";
    if (!grows) article.append(this.#foot(index, message));
    if (isLong) article.querySelector(".foot").append(this.#folder(message, body));
    return article;
  }

  /** A button that shows a long message, or only its beginning. */
  #folder(message, body) {
    const button = make("button", { type: "button", className: "fold" });
    const draw = () => {
      const isOpen = this.#unfolded.has(message);
      body.classList.toggle("folded", !isOpen);
      button.textContent = isOpen ? "Show less" : "Show all";
      button.setAttribute("aria-expanded", isOpen);
    };
    button.addEventListener("click", () => {
      if (!this.#unfolded.delete(message)) this.#unfolded.add(message);
      draw();
    });
    draw();
    return button;
  }

  #foot(index, message) {
    const foot = make("div", { className: "foot" });
    const { versions, writing } = this.#conversation;
    const version = versions[index];
    if (version && version.at >= 0 && version.ids.length > 1) foot.append(this.#switcher(version));
    foot.append(copyButton(() => textOf(message), "Copy the message"));
    if (writing) return foot;
    if (message.role === "user") {
      const button = iconButton("edit", "Edit the message", () => this.#edit(index));
      button.dataset.action = "edit";
      foot.append(button);
    } else {
      foot.append(iconButton("again", "Write another reply", () => this.#actions.again(index)));
    }
    return foot;
  }

  #switcher({ at, ids }) {
    const step = (name, label, to) => {
      const button = iconButton(name, label, () => this.#actions.open(ids[to]));
      button.disabled = to < 0 || to >= ids.length;
      return button;
    };
    return make("span", { className: "versions", role: "group", "aria-label": "Versions of this message" },
      step("previous", "Previous version", at - 1),
      make("span", { className: "at" }, `${at + 1} / ${ids.length}`),
      step("next", "Next version", at + 1));
  }

  #editor() {
    const editing = this.#editing;
    const area = make("textarea", { value: editing.text, "aria-label": "Edit the message", rows: 1 });
    const fit = () => fitHeight(area);
    const save = (event) => {
      event?.preventDefault();
      if (area.value.trim() === "") return;
      this.#editing = null;
      this.#actions.edit(editing.index, area.value);
    };
    area.addEventListener("input", () => { editing.text = area.value; fit(); });
    area.addEventListener("keydown", (event) => {
      if (sends(event)) save(event);
    });
    requestAnimationFrame(fit);
    return make("form", { className: "editor", onsubmit: save }, area,
      make("p", { className: "choices" },
        make("button", { type: "button", onclick: () => this.stopEditing() }, "Cancel"),
        make("button", { type: "submit", className: "strong" }, "Send")));
  }

  #drawNotices() {
    const { error, finish, writing, unanswered } = this.#conversation;
    const again = (text) => make("button", { type: "button", onclick: () => this.#actions.retry() },
      icon("again"), text);
    let notice = null;
    if (writing) notice = null;
    else if (error !== null) {
      notice = make("div", { className: "note error", role: "alert" }, make("p", {}, error), again("Try again"));
    } else if (unanswered) {
      notice = make("div", { className: "note" }, make("p", {}, "This message has no reply yet."), again("Get a reply"));
    } else if (finish === "length") {
      notice = make("p", { className: "note" }, "The reply was cut off: it reached the most tokens that it may have.");
    }
    notices.replaceChildren(...(notice ? [notice] : []));
  }
}

/** Whether this key sends what was written; in an input method it only ends a word. */
export const sends = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing;

/** Make a text field as high as its text. */
export function fitHeight(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + 2}px`;
}

function welcome() {
  return make("div", { className: "welcome" },
    make("h2", {}, "What would you like to talk about?"),
    make("p", { className: "quiet" },
      "The chat may become much longer than the cache: a policy decides which tokens stay in it, and "
      + "what your message asks for comes back from a log."));
}
