"""Content credentials: a C2PA manifest in each picture and film, signed by the operator.

Only where a certificate and its key are set; only then is the library loaded (extra `c2pa`). The
manifest says what the XMP mark says, that a trained model made it, and who says so; the signature
covers the file, so that a change of it can be told.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jobs.formats import FORMATS
from jobs.marking import GENERATED
from jobs.pictures import encode_png
from jobs.settings import Settings
from jobs.version import VERSION

_SIGNED = ("png", "webp", "gif")
log = logging.getLogger(__name__)


class CredentialsError(ValueError):
    """A certificate, key or installation that cannot sign; the message names the setting."""


class Credentials:
    """Signs files. Raises CredentialsError, from a trial signature, when it is made.

    certificates: PEM, the signer's and those between it and the root. key: PEM, of PKCS #8.
    algorithm: as C2PA names it. Safe between threads.
    """

    def __init__(self, certificates: bytes, key: bytes, algorithm: str) -> None:
        try:
            import c2pa
        except ImportError as error:
            raise CredentialsError(
                "DDPM_C2PA_CERTIFICATE: signing needs c2pa-python, which is not installed: "
                "pip install 'ddpm-serve[c2pa]'"
            ) from error
        self._c2pa: Any = c2pa
        self._certificates, self._key, self._algorithm = certificates, key, algorithm
        try:
            trial = self._sign(encode_png(np.zeros((8, 8, 1), np.uint8)), "png", "trial", GENERATED)
            reader = c2pa.Reader("image/png", io.BytesIO(trial))
            told = reader.get_active_manifest() or {}
        except Exception as error:  # the library has a dozen kinds, for what is in the two files
            raise CredentialsError(
                "DDPM_C2PA_CERTIFICATE, DDPM_C2PA_KEY, DDPM_C2PA_ALGORITHM: no picture can be "
                f"signed with these: {error}"
            ) from error
        self.signer: Mapping[str, Any] = told.get("signature_info", {})

    def signed(self, content: bytes, suffix: str, source_type: str, made: str) -> bytes:
        """The file with its manifest, whose title is `made`; of another format as it is.

        A certificate that has run out must not take the pictures away: they come unsigned, and the
        log says so.
        """
        if suffix not in _SIGNED:
            return content
        try:
            return self._sign(content, suffix, made, source_type)
        except Exception as error:  # as above
            log.error("a picture is not signed: %s", error)
            return content

    def _sign(self, content: bytes, suffix: str, made: str, source_type: str) -> bytes:
        c2pa = self._c2pa
        action = {
            "action": "c2pa.created",
            "digitalSourceType": source_type,
            "softwareAgent": {"name": "ddpm-serve", "version": VERSION},
        }
        manifest = {
            "title": made,
            "claim_generator_info": [{"name": "ddpm-serve", "version": VERSION}],
            "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [action]}}],
        }
        # Pictures are small: a thumbnail would be many times as large.
        options = c2pa.Settings.from_dict({"builder": {"thumbnail": {"enabled": False}}})
        signer = c2pa.Signer.from_info(
            c2pa.C2paSignerInfo(self._algorithm, self._certificates, self._key, None)
        )
        file = io.BytesIO()
        with c2pa.Builder(manifest, context=c2pa.Context(options)) as builder:
            builder.sign(signer, FORMATS[suffix].media, io.BytesIO(content), file)
        return file.getvalue()


def credentials_of(settings: Settings) -> Credentials | None:
    """What the settings ask for; None: nothing is signed. Raises CredentialsError."""
    paths = {
        "DDPM_C2PA_CERTIFICATE": settings.c2pa_certificate,
        "DDPM_C2PA_KEY": settings.c2pa_key,
    }
    given = {name: path for name, path in paths.items() if path is not None}
    if not given:
        return None
    if len(given) < len(paths):
        (missing,) = paths.keys() - given.keys()
        raise CredentialsError(f"{missing}: must be set too, where {next(iter(given))} is")
    found = [_read(name, path) for name, path in given.items()]
    return Credentials(found[0], found[1], settings.c2pa_algorithm)


def _read(name: str, path: Path) -> bytes:
    try:
        return path.expanduser().read_bytes()
    except OSError as error:
        raise CredentialsError(f"{name} = {path}: {error.strerror}") from error
