"""Every error this package raises on purpose.

JobsError
├── SpecError          a request that cannot be run as it stands (field, detail)
├── Refused            admission says no: code, detail, retry_after
├── JobNotFound        no such job
├── OutputExpired      the job is known, its outputs are gone
└── PictureError       an upload that is no picture we can use
    ├── PictureTooLarge    more pixels or scans than allowed
    ├── PictureMedia       not PNG, JPEG or WebP
    └── PictureShape       does not have the model's size (and fit is `error`)
"""

from __future__ import annotations


class JobsError(Exception):
    """Base of this package's errors."""


class SpecError(JobsError, ValueError):
    """A field of a request has a value that the model or the limits do not allow.

    pointer: JSON pointer of the field (RFC 6901), such as `/num_images`.
    """

    def __init__(self, pointer: str, detail: str) -> None:
        super().__init__(f"{pointer}: {detail}")
        self.pointer = pointer
        self.detail = detail


class Refused(JobsError):
    """Admission refuses a job that is valid in itself.

    code: `queue_full`, `storage_full` (503), `quota_exceeded` (429) or `idempotency_conflict`
    (422). retry_after: seconds until it is worth asking again, where that makes sense.
    """

    def __init__(self, code: str, detail: str, retry_after: int | None = None) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.retry_after = retry_after


class JobNotFound(JobsError, LookupError):
    """No job with this id is known (never was, was deleted, or its record has lapsed)."""


class OutputExpired(JobsError, LookupError):
    """The job is known, but its outputs have passed their time to live."""


class PictureError(JobsError, ValueError):
    """An uploaded picture that cannot be used; the message says why."""


class PictureTooLarge(PictureError):
    """More pixels, or more JPEG scans or parts, than the limit."""


class PictureMedia(PictureError):
    """Not a picture of a format that is read here."""


class PictureShape(PictureError):
    """The picture does not have the model's height and width."""
