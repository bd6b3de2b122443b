"""The server as a whole: its routes, behind what every request and every answer passes."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from kvp_edge import __version__
from kvp_edge.server.access import LOCAL_ORIGINS, Access
from kvp_edge.server.answers import Answers
from kvp_edge.server.chats import Chats
from kvp_edge.server.errors import APIError, ErrorBody, of_no_json, of_validation, unforeseen
from kvp_edge.server.openai_routes import openai_routes
from kvp_edge.server.page_routes import PAGE, page_routes
from kvp_edge.server.served import ServedLlama
from kvp_edge.server.serving import Serving, Settings

#: No script, style or request but the page's own.
_POLICY = "; ".join(
    (
        *("default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'"),
        *("img-src 'self' data:", "base-uri 'none'", "form-action 'none'"),
        "frame-ancestors 'none'",
    )
)
_HEADERS = {
    "Cache-Control": "no-cache",  # asked for anew, or the page would mix files of two versions
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def make_app(llms: list[ServedLlama], store: Chats, settings: Settings) -> FastAPI:
    """The server, which owns the models and the store from its start to its end."""
    serving = Serving(llms, store, settings)
    app = FastAPI(
        title="kvp-edge serve",
        version=__version__,
        lifespan=serving.lifespan,
        docs_url=None,
        redoc_url=None,
        responses={"4XX": {"model": ErrorBody, "description": "what is wrong with the request"}},
    )
    app.add_middleware(
        CORSMiddleware,
        allow_origin_regex=LOCAL_ORIGINS,
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],  # clients in pages name themselves in some of their own
    )
    app.add_middleware(Access, rules=settings.rules)
    app.add_middleware(Answers, headers=_HEADERS, seen=serving.metrics.answered)
    app.include_router(openai_routes(serving))
    app.include_router(page_routes(serving))
    app.mount("/page", StaticFiles(directory=PAGE), name="page")

    @app.exception_handler(APIError)
    async def of_ours(_: Request, error: APIError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return of_validation(error).response()

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> Response:
        cause = error.__cause__
        if isinstance(cause, APIError):
            return cause.response()
        if isinstance(cause, (RecursionError, ValueError)):
            return of_no_json(cause).response()
        method, path, headers = request.method, request.url.path[:80], dict(error.headers or {})
        hints = {
            404: "OpenAI's paths begin with /v1/",
            405: f"use {headers.get('Allow', 'another method')}",
        }
        hint = hints.get(error.status_code)
        sentence = f"there is nothing at {method} {path}; {hint}" if hint else str(error.detail)
        return APIError(error.status_code, sentence, headers=headers).response()

    @app.exception_handler(Exception)
    async def not_foreseen(_: Request, __: Exception) -> Response:
        return unforeseen().response()  # uvicorn prints it

    return app
