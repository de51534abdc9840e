"""Jobs as handles: what is known of one, and what can be done with it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any, Literal

from ddpm_client import flows
from ddpm_client.events import Event
from ddpm_client.models import Fault, JobData, Progress, SnapshotData
from ddpm_client.pictures import Float32, in_archive, to_array

if TYPE_CHECKING:
    from PIL import Image

    from ddpm_client.asynchronous import AsyncClient
    from ddpm_client.client import Client

Kind = Literal["x_t", "x_start", "eps"]


class Known:
    """What was last heard of a job; `refresh` asks again."""

    data: JobData

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.kind} {self.id} {self.status}>"

    @property
    def id(self) -> str:
        """What the service calls it."""
        return self.data.id

    @property
    def kind(self) -> str:
        """generate, noise, …"""
        return self.data.kind

    @property
    def status(self) -> str:
        """queued, running, succeeded, failed, canceled or expired."""
        return self.data.status

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.data.ended

    @property
    def progress(self) -> Progress | None:
        """How far it is, once it runs."""
        return self.data.progress

    @property
    def request(self) -> dict[str, Any]:
        """What was asked for, with every default and the seed."""
        return self.data.request

    @property
    def result(self) -> dict[str, Any] | None:
        """The numbers of a kind that gives numbers."""
        return self.data.result

    @property
    def error(self) -> Fault | None:
        """Why it failed."""
        return self.data.error

    @property
    def manifest(self) -> dict[str, Any] | None:
        """What makes the same images again: `client.create(**job.manifest)`."""
        return self.data.manifest

    @property
    def snapshots(self) -> list[SnapshotData]:
        """The kept states of its chain: their t, index and kind."""
        return self.data.snapshots or []

    def _heard(self, data: JobData) -> None:
        self.data = data

    @property
    def _root(self) -> str:
        return f"/jobs/{self.id}"

    def _snapshot(self, t: int, index: int, suffix: str) -> str:
        return f"{self._root}/snapshots/{t}/{index}.{suffix}"


class Job(Known):
    """A job of a Client."""

    def __init__(self, client: Client, data: JobData) -> None:
        self._client = client
        self.data = data

    def refresh(self) -> Job:
        """Ask how it stands."""
        self.data = self._client.run(flows.get(JobData, self._root, self._client.retry))
        return self

    def wait(self, timeout: float | None = None) -> Job:
        """Until it has succeeded. Raises JobEnded, or WaitTimeout after so many seconds."""
        deadline = flows.Deadline(timeout)
        flow = flows.until_ended(self.data, deadline, self._client.retry, self._heard)
        self._client.run(flow)
        return self

    def cancel(self) -> Job:
        """Stop it; one that has ended stays as it is."""
        flow = flows.post(JobData, f"{self._root}/cancel", self._client.retry)
        self.data = self._client.run(flow)
        return self

    def delete(self) -> None:
        """Delete it with its outputs."""
        self._client.run(flows.delete(self._root, self._client.retry))

    def events(self, *, inline: bool = False, last_event_id: str | None = None) -> Iterator[Event]:
        """As `Client.stream`."""
        return self._client.stream(self, inline=inline, last_event_id=last_event_id)

    @property
    def images(self) -> list[Image.Image]:
        """All its images, as PIL images."""
        return in_archive(self.archive(format="png"))

    def array(self, index: int = 0) -> Float32:
        """One image as float32 [C,H,W] in −1..1."""
        return to_array(self.image(index, format="npy"))

    def image(self, index: int = 0, *, format: str = "png", px: int | None = None) -> bytes:
        """The file of one image. px: its longer side, about."""
        return self._file(f"{self._root}/images/{index}.{format}", px=px)

    def grid(self, *, format: str = "png", px: int | None = None) -> bytes:
        """The file of all images in one picture."""
        return self._file(f"{self._root}/grid.{format}", px=px)

    def mean(self, *, format: str = "png", px: int | None = None) -> bytes:
        """The file of the images' mean."""
        return self._file(f"{self._root}/mean.{format}", px=px)

    def std(self, *, format: str = "png", px: int | None = None) -> bytes:
        """The file of their standard deviation: where they differ."""
        return self._file(f"{self._root}/std.{format}", px=px)

    def film(
        self,
        *,
        format: str = "gif",
        kind: Kind = "x_t",
        index: int | None = None,
        px: int | None = None,
    ) -> bytes:
        """The file of the chain as a film, from its snapshots. index: of one image alone."""
        return self._file(f"{self._root}/snapshots.{format}", kind=kind, index=index, px=px)

    def snapshot(
        self,
        t: int,
        index: int = 0,
        *,
        kind: Kind = "x_t",
        format: str = "png",
        px: int | None = None,
    ) -> bytes:
        """The file of one kept state."""
        return self._file(self._snapshot(t, index, format), kind=kind, px=px)

    def archive(self, *, format: str | None = None) -> bytes:
        """A zip of all images and the manifest."""
        return self._file(f"{self._root}/images.zip", format=format)

    def _file(self, path: str, **params: Any) -> bytes:
        return self._client.run(flows.file(path, self._client.retry, **params))


class AsyncJob(Known):
    """A job of an AsyncClient: as Job, with `await` before whatever asks the service."""

    def __init__(self, client: AsyncClient, data: JobData) -> None:
        self._client = client
        self.data = data

    async def refresh(self) -> AsyncJob:
        """Ask how it stands."""
        self.data = await self._client.run(flows.get(JobData, self._root, self._client.retry))
        return self

    async def wait(self, timeout: float | None = None) -> AsyncJob:  # noqa: ASYNC109
        """Until it has succeeded. Raises JobEnded, or WaitTimeout after so many seconds."""
        deadline = flows.Deadline(timeout)
        flow = flows.until_ended(self.data, deadline, self._client.retry, self._heard)
        await self._client.run(flow)
        return self

    async def cancel(self) -> AsyncJob:
        """Stop it; one that has ended stays as it is."""
        flow = flows.post(JobData, f"{self._root}/cancel", self._client.retry)
        self.data = await self._client.run(flow)
        return self

    async def delete(self) -> None:
        """Delete it with its outputs."""
        await self._client.run(flows.delete(self._root, self._client.retry))

    def events(
        self, *, inline: bool = False, last_event_id: str | None = None
    ) -> AsyncIterator[Event]:
        """As `AsyncClient.stream`."""
        return self._client.stream(self, inline=inline, last_event_id=last_event_id)

    @property
    async def images(self) -> list[Image.Image]:
        """All its images, as PIL images: `await job.images`."""
        return in_archive(await self.archive(format="png"))

    async def array(self, index: int = 0) -> Float32:
        """One image as float32 [C,H,W] in −1..1."""
        return to_array(await self.image(index, format="npy"))

    async def image(self, index: int = 0, *, format: str = "png", px: int | None = None) -> bytes:
        """The file of one image. px: its longer side, about."""
        return await self._file(f"{self._root}/images/{index}.{format}", px=px)

    async def grid(self, *, format: str = "png", px: int | None = None) -> bytes:
        """The file of all images in one picture."""
        return await self._file(f"{self._root}/grid.{format}", px=px)

    async def mean(self, *, format: str = "png", px: int | None = None) -> bytes:
        """The file of the images' mean."""
        return await self._file(f"{self._root}/mean.{format}", px=px)

    async def std(self, *, format: str = "png", px: int | None = None) -> bytes:
        """The file of their standard deviation: where they differ."""
        return await self._file(f"{self._root}/std.{format}", px=px)

    async def film(
        self,
        *,
        format: str = "gif",
        kind: Kind = "x_t",
        index: int | None = None,
        px: int | None = None,
    ) -> bytes:
        """The file of the chain as a film, from its snapshots. index: of one image alone."""
        return await self._file(f"{self._root}/snapshots.{format}", kind=kind, index=index, px=px)

    async def snapshot(
        self,
        t: int,
        index: int = 0,
        *,
        kind: Kind = "x_t",
        format: str = "png",
        px: int | None = None,
    ) -> bytes:
        """The file of one kept state."""
        return await self._file(self._snapshot(t, index, format), kind=kind, px=px)

    async def archive(self, *, format: str | None = None) -> bytes:
        """A zip of all images and the manifest."""
        return await self._file(f"{self._root}/images.zip", format=format)

    async def _file(self, path: str, **params: Any) -> bytes:
        return await self._client.run(flows.file(path, self._client.retry, **params))
