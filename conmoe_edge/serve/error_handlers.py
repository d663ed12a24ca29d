"""Every error of a route leaves as the error object of the API that was asked. No torch."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from conmoe_edge.serve.busy import Busy
from conmoe_edge.serve.clients import ClientLeft
from conmoe_edge.serve.http_errors import ApiError, as_api_error, body_for


def new_app() -> FastAPI:
    """An application without routes that answers errors."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)

    @app.exception_handler(ApiError)
    async def _api_error(request: Request, error: ApiError) -> Response:
        return _response(error, request)

    @app.exception_handler(Busy)
    async def _busy(request: Request, error: Exception) -> Response:
        return _response(as_api_error(error), request)

    @app.exception_handler(ClientLeft)
    async def _left_early(request: Request, error: Exception) -> Response:
        return Response(status_code=499)

    @app.exception_handler(404)
    async def _no_route(request: Request, error: Exception) -> Response:
        return _response(ApiError(404, "There is nothing at this address."), request)

    @app.exception_handler(405)
    async def _no_method(request: Request, error: Exception) -> Response:
        allowed = getattr(error, "headers", None)  # what would do
        return _response(ApiError(405, "Not by this method.", headers=allowed), request)

    @app.exception_handler(Exception)
    async def _bug(request: Request, error: Exception) -> Response:
        return _response(as_api_error(error), request)

    return app


def _response(error: ApiError, request: Request) -> Response:
    return JSONResponse(body_for(error, request.url.path), error.status, error.headers)
