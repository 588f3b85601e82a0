"""OpenAI's routes for files, fine-tuning jobs and models, on SGLang's app."""

import asyncio
import secrets
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import quote

from fastapi import FastAPI, Query
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import FileResponse

from sglang.srt.mezo.core.errors import shown
from sglang.srt.mezo.service.http.endpoint import (
    Endpoint,
    Handler,
    Service,
    add_routes,
    changes,
    read_json,
    reads,
    require_writable,
)
from sglang.srt.mezo.service.http.protocol import (
    CreateJob,
    Json,
    bounded_page_object,
    checkpoint_page_object,
    estimated_finish,
    event_object,
    file_object,
    job_object,
    model_name,
    model_object,
    page_object,
)
from sglang.srt.mezo.service.http.uploads import PURPOSE, receive_file
from sglang.srt.mezo.service.jobs import results
from sglang.srt.mezo.service.jobs.fit import limits
from sglang.srt.mezo.service.jobs.hyperparameters import resolve, stored
from sglang.srt.mezo.service.store.store import Store
from sglang.srt.mezo.service.wire.errors import NotFound, RequestError
from sglang.srt.mezo.service.wire.records import ServedAdapter, StoredFile, StoredJob, new_id, now

Result = TypeVar("Result")
Limit = Annotated[int, Query(ge=1, le=100)]
FileLimit = Annotated[int, Query(ge=1, le=10_000)]

_MAX_PAIRS = 16  # of metadata, as many as a job can have
_PIECE_BYTES = 1 << 20
_PACE_EVENTS = 50  # the newest events of a job, from which its pace is taken


def install(app: FastAPI, service: Service) -> None:
    """Add the routes to SGLang's app, those for models in front of SGLang's own."""
    add_routes(app, _Files(service).endpoints(), service)
    add_routes(app, _Jobs(service).endpoints(), service)
    upstream = {
        route.path: route
        for route in app.router.routes
        if isinstance(route, APIRoute) and "GET" in (route.methods or ())
    }
    first = min(app.router.routes.index(upstream[path]) for path in ("/v1/models", "/v1/models/{model:path}"))
    models = _Models(service, upstream["/v1/models"].endpoint, upstream["/v1/models/{model:path}"].endpoint)
    present = len(app.router.routes)
    add_routes(app, models.endpoints())
    added = app.router.routes[present:]
    del app.router.routes[present:]
    app.router.routes[first:first] = added


class _Files:
    def __init__(self, service: Service):
        self._service = service

    def endpoints(self) -> list[Endpoint]:
        return [
            Endpoint("POST", "/v1/files", self.create),
            Endpoint("GET", "/v1/files", self.list),
            Endpoint("GET", "/v1/files/{file_id}", self.retrieve),
            Endpoint("GET", "/v1/files/{file_id}/content", self.content),
            Endpoint("DELETE", "/v1/files/{file_id}", self.delete),
        ]

    @changes
    async def create(self, request: Request) -> Json:
        """Upload a file: a multipart form with ``file``, ``purpose`` and, if it is to be deleted by itself,
        ``expires_after``."""
        service = self._service
        return file_object(await receive_file(request, service.store, service.threads, service.settings.max_file_bytes))

    @reads
    async def list(
        self,
        after: str | None = None,
        limit: FileLimit = 10_000,
        order: Literal["asc", "desc"] = "desc",
        purpose: str | None = None,
    ) -> Json:
        """Files, by default the newest first."""
        return await self._service.threads.read(self._page, after, limit, order, purpose)

    def _page(self, after: str | None, limit: int, order: Literal["asc", "desc"], purpose: str | None) -> Json:
        return bounded_page_object(self._service.store.files(after, limit, order, purpose), file_object)

    @reads
    async def retrieve(self, file_id: str) -> Json:
        """What is known of a file."""
        return file_object(await self._service.threads.read(self._service.store.file, file_id))

    @reads
    async def content(self, file_id: str) -> FileResponse:
        """What a file holds."""
        file, path = await self._service.threads.read(self._file_and_content, file_id)
        headers = {
            "Content-Disposition": "attachment; "
            f"filename={file.id}{'.csv' if file.purpose == results.PURPOSE else '.jsonl'}; "
            f"filename*=UTF-8''{quote(file.filename, safe='')}",
            "X-Content-Type-Options": "nosniff",
        }
        return FileResponse(path, headers=headers, media_type="application/octet-stream")

    def _file_and_content(self, file_id: str) -> tuple[StoredFile, Path]:
        file = self._service.store.file(file_id)
        return file, self._service.store.content(file)

    @changes
    async def delete(self, file_id: str) -> Json:
        """Delete a file."""
        await self._service.threads.call(self._service.store.delete_file, file_id)
        return {"id": file_id, "object": "file", "deleted": True}


class _Jobs:
    def __init__(self, service: Service):
        self._service = service

    def endpoints(self) -> list[Endpoint]:
        job = "/v1/fine_tuning/jobs/{job_id}"
        return [
            Endpoint("POST", "/v1/fine_tuning/jobs", self.create, CreateJob),
            Endpoint("GET", "/v1/fine_tuning/jobs", self.list),
            Endpoint("GET", job, self.retrieve),
            Endpoint("POST", f"{job}/cancel", self.cancel),
            Endpoint("POST", f"{job}/pause", self.pause),
            Endpoint("POST", f"{job}/resume", self.resume),
            Endpoint("GET", f"{job}/events", self.events),
            Endpoint("GET", f"{job}/checkpoints", self.checkpoints),
        ]

    @changes
    async def create(self, request: Request) -> Json:
        """Create a job. Its files are validated, then it waits for the engine."""
        body = await read_json(request, CreateJob)
        return await self._service.threads.run(self._create(body))

    async def _create(self, body: CreateJob) -> Json:
        service = self._service
        origin = await asyncio.to_thread(service.manager.origins.read, body.model)
        if body.integrations:
            raise RequestError(400, "integrations are not supported: leave them out", "integrations", "unsupported")
        training_file = self._training_data(body.training_file, "training_file")
        if body.validation_file is not None:
            self._training_data(body.validation_file, "validation_file")
        num_train = await asyncio.to_thread(lambda: _count_rows(service.store.content(training_file, "training_file")))
        seed = secrets.randbits(31) if body.seed is None else body.seed
        sent = body.model_dump(exclude_unset=True)
        config, hyperparameters = resolve(sent, service.engine, num_train, seed, origin)
        job_id = new_id("ftjob-")
        job = StoredJob(
            id=job_id,
            created_at=now(),
            finished_at=None,
            status="validating_files",
            model=service.client.served_model_name if origin is None else body.model,
            training_file=body.training_file,
            validation_file=body.validation_file,
            seed=seed,
            suffix=body.suffix,
            adapter_name=service.manager.adapter_name_for(job_id, body.suffix),
            metadata=body.metadata or {},
            request=sent,
            hyperparameters=hyperparameters,
            config=stored(config),
            fine_tuned_model=None,
            trained_tokens=None,
            error=None,
            step=0,
            version=0,
            engine=limits(service.engine),
        )
        return self._object(await service.manager.create_job(job, origin))

    def _training_data(self, file_id: str, param: str) -> StoredFile:
        try:
            file = self._service.store.file(file_id)
        except NotFound as error:
            raise NotFound("file", file_id, param) from error
        if file.purpose != PURPOSE:
            message = f"{param}={file_id!r} is not allowed: its purpose is {file.purpose!r}, and {PURPOSE!r} is needed"
            raise RequestError(400, message, param, "invalid_value")
        return file

    @reads
    async def list(self, request: Request, after: str | None = None, limit: Limit = 20) -> Json:
        """Jobs, the newest first; with ``metadata[key]=value`` those that have these pairs."""
        return await self._read(
            lambda store: page_object(store.jobs(after, limit, _metadata_filter(request)), self._object)
        )

    @reads
    async def retrieve(self, job_id: str) -> Json:
        """A job, with its status, its error and the name of its model."""
        return await self._read(lambda store: self._object(store.job(job_id)))

    @changes
    async def cancel(self, job_id: str) -> Json:
        """End a job for good."""
        return await self._changed(self._service.manager.cancel(job_id))

    @changes
    async def pause(self, job_id: str) -> Json:
        """Take the engine from a job; its log keeps the steps."""
        return await self._changed(self._service.manager.pause(job_id))

    @changes
    async def resume(self, job_id: str) -> Json:
        """Let a paused job go on from its last step."""
        return await self._changed(self._service.manager.resume(job_id))

    @reads
    async def events(self, job_id: str, after: str | None = None, limit: Limit = 20) -> Json:
        """What a job has told, the newest first."""
        return await self._read(lambda store: page_object(store.events(job_id, after, limit), event_object))

    @reads
    async def checkpoints(self, job_id: str, after: str | None = None, limit: Limit = 10) -> Json:
        """Adapters of earlier steps, each with a name for requests; the newest first."""
        served = self._service.client.served_model_name
        return await self._read(lambda store: checkpoint_page_object(store.checkpoints(job_id, after, limit), served))

    async def _read(self, read: Callable[[Store], Json]) -> Json:
        return await self._service.threads.read(read, self._service.store)

    async def _changed(self, change: Coroutine[Any, Any, StoredJob]) -> Json:
        job = await self._service.threads.run(change)
        return await self._read(lambda store: self._object(job))

    def _object(self, job: StoredJob) -> Json:
        if job.status != "running":
            return job_object(job)
        return job_object(job, estimated_finish(job, self._service.store.events(job.id, limit=_PACE_EVENTS).data))


def _count_rows(path: Path) -> int:
    """Lines that are not blank, of any length, a piece of the file at a time."""
    count, blank = 0, True
    with open(path, "rb") as file:
        while piece := file.read(_PIECE_BYTES):
            first, *others = piece.split(b"\n")
            blank = blank and not first.strip()
            for line in others:
                count += not blank
                blank = not line.strip()
    return max(1, count + (not blank))


def _metadata_filter(request: Request) -> dict[str, str] | None:
    """``metadata[k]=v`` for each pair that a job must have, ``metadata=null`` for jobs that have none."""
    query = request.query_params
    pairs = {key[9:-1]: value for key, value in query.items() if key.startswith("metadata[") and key.endswith("]")}
    if len(pairs) > _MAX_PAIRS:
        raise RequestError(
            400, f"{len(pairs)} pairs of metadata are not allowed: at most {_MAX_PAIRS}", "metadata", "invalid_value"
        )
    if "metadata" not in query:
        return pairs or None
    if query["metadata"] != "null" or pairs:
        message = f"metadata={shown(query['metadata'])} is not allowed: metadata[key]=value, or null alone"
        raise RequestError(400, message, "metadata", "invalid_value")
    return {}


class _Models:
    """SGLang's models and ours. What SGLang serves is answered whether the service is ready or not."""

    def __init__(self, service: Service, upstream_list: Handler, upstream_retrieve: Handler):
        self._service = service
        self._upstream_list = upstream_list
        self._upstream_retrieve = upstream_retrieve

    def endpoints(self) -> list[Endpoint]:
        return [
            Endpoint("GET", "/v1/models", self.list),
            Endpoint("GET", "/v1/models/{model:path}", self.retrieve),
            Endpoint("DELETE", "/v1/models/{model:path}", self.delete),
        ]

    @reads
    async def list(self) -> Json:
        """The served model and the fine-tuned ones."""
        cards = [card.model_dump() for card in (await self._upstream_list()).data]
        served, final = await self._read(self._served_and_final)
        # SGLang lists a loaded adapter by its bare name; ours go by the name that a request has to use.
        cards = [card for card in cards if card["parent"] is None or card["id"] not in served]
        return {"object": "list", "data": cards + list(map(self._card, final))}

    @reads
    async def retrieve(self, model: str) -> Any:
        """One model."""
        adapter = await self._read(self._adapter, model)
        return await self._upstream_retrieve(model) if adapter is None else self._card(adapter)

    @changes
    async def delete(self, model: str) -> Json:
        """Serve a fine-tuned model and its checkpoints no more; its name is free again."""
        name = await self._read(self._adapter_name, model)
        await require_writable(self._service)
        await self._service.threads.run(self._service.manager.delete_model(name))
        return {"id": model, "object": "model", "deleted": True}

    async def _read(self, read: Callable[..., Result], *args: Any) -> Result:
        """Before the service is ready there are neither threads nor a store, and none of our models."""
        return await self._service.threads.read(read, *args) if self._service.ready else read(*args)

    def _adapter_name(self, model: str) -> str:
        # Of a job that did not succeed there may be checkpoints alone, which go by the name that its model would have
        # had.
        names = {
            name for served in self._service.store.served() for name in (served.name, served.name.partition(":")[0])
        }
        name = next((name for name in names if self._model_name(name) == model), None)
        if name is None:
            raise RequestError(404, f"there is no fine-tuned model {shown(model)}", "model", "model_not_found")
        return name

    def _served(self) -> dict[str, ServedAdapter]:
        if not self._service.ready:
            return {}
        return {
            adapter.name: adapter
            for adapter in self._service.store.served()
            if self._service.manager.serves(adapter.name)
        }

    def _served_and_final(self) -> tuple[dict[str, ServedAdapter], Sequence[ServedAdapter]]:
        served = self._served()
        return served, [adapter for adapter in served.values() if self._is_final(adapter)]

    def _adapter(self, model: str) -> ServedAdapter | None:
        """What serves a name, None where that is not one of ours."""
        return next((adapter for adapter in self._served().values() if self._name(adapter) == model), None)

    def _is_final(self, adapter: ServedAdapter) -> bool:
        """Checkpoints are listed with their job."""
        return self._service.store.job(adapter.job_id).adapter_name == adapter.name

    def _name(self, adapter: ServedAdapter) -> str:
        return self._model_name(adapter.name)

    def _model_name(self, name: str) -> str:
        return model_name(self._service.client.served_model_name, name)

    def _card(self, adapter: ServedAdapter) -> Json:
        client = self._service.client
        return model_object(self._name(adapter), adapter.created_at, client.served_model_name, client.context_length)
