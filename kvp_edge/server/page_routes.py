"""The page, and what it asks for: the chats, and the cache as it is now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from kvp_edge.server import cache_view
from kvp_edge.server.chats import Chat
from kvp_edge.server.errors import APIError
from kvp_edge.server.serving import Serving

PAGE = Path(__file__).parent / "page"


def page_routes(serving: Serving) -> APIRouter:
    routes = APIRouter()

    def facts(chat: Chat) -> dict[str, Any]:
        return {
            "id": chat.id,
            "title": chat.title,
            "parent": chat.parent,
            "n_messages": len(chat.messages),
            "n_tokens": len(chat.tokens),
            "bytes": chat.nbytes,
            "created": chat.created,
            "updated": chat.updated,
            "resident": any(context.chat is chat for context in serving.contexts),
        }

    def known(id: str) -> Chat:
        chat = serving.store.get(id)
        if chat is None:
            raise APIError(404, f"there is no chat '{id[:40]}'", code="chat_not_found")
        return chat

    @routes.get("/kvp/chats")
    async def all_chats() -> Any:
        return {"chats": [facts(chat) for chat in serving.store.all() if chat.messages]}

    @routes.get("/kvp/chats/{id}")
    async def one_chat(id: str) -> Any:
        chat = known(id)
        return {**facts(chat), "messages": chat.messages}

    @routes.delete("/kvp/chats/{id}", status_code=204)
    async def delete_chat(id: str) -> Response:
        known(id)
        serving.store.delete(id)
        return Response(status_code=204)

    @routes.get("/kvp/cache")
    def cache(chat: str | None = None, texts_from: int = 0) -> Any:
        context = next(
            (c for c in serving.contexts if c.chat and c.chat.id == chat), serving.contexts[0]
        )
        context.watch()
        return cache_view.view(context, serving.at_work > 0, chat, max(texts_from, 0))

    @routes.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response((PAGE / "index.html").read_bytes(), media_type="text/html")

    return routes
