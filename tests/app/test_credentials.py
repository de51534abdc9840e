"""Signed pictures, read by the reader of C2PA, with certificates made for the test."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import c2pa
import httpx
import numpy as np
import pytest
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from PIL import Image

from app.commands import doctor
from app.credentials import CredentialsError, credentials_of
from jobs.marking import GENERATED
from jobs.pictures import read_manifest
from jobs.settings import Settings
from tests.app.conftest import Worker
from tests.app.test_marking import made, source_type

Key = ec.EllipticCurvePrivateKey
_USAGES = ("key_encipherment", "data_encipherment", "key_agreement", "content_commitment")
_NEVER = dict.fromkeys((*_USAGES, "encipher_only", "decipher_only"), False)


def certificate(name: str, key: Key, *, by: str, by_key: Key, days: int = 30) -> str:
    """PEM; one that signs itself is an authority."""
    is_root, now = name == by, datetime.now(UTC)
    subject, issuer = (
        x509.Name(
            [
                x509.NameAttribute(NameOID.COMMON_NAME, one),
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Studio of the test"),
            ]
        )
        for one in (name, by)
    )
    usage = x509.KeyUsage(
        digital_signature=not is_root, key_cert_sign=is_root, crl_sign=is_root, **_NEVER
    )
    public = x509.AuthorityKeyIdentifier.from_issuer_public_key(by_key.public_key())
    builder = (
        x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=60))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=is_root, path_length=None), critical=True)
        .add_extension(public, critical=False)
        .add_extension(usage, critical=True)
    )
    if not is_root:
        purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
        builder = builder.add_extension(purpose, critical=False)
    signed = builder.sign(by_key, hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM).decode()


@dataclass(frozen=True)
class Studio:
    """A certificate with its root and key, as files."""

    root: str
    chain: Path
    key: Path

    @property
    def settings(self) -> dict[str, Any]:
        return {"c2pa_certificate": self.chain, "c2pa_key": self.key}


def studio(folder: Path, days: int = 30) -> Studio:
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    root = certificate("root", keys[0], by="root", by_key=keys[0])
    leaf = certificate("pictures", keys[1], by="root", by_key=keys[0], days=days)
    (folder / "chain.pem").write_text(leaf + root)
    pem = keys[1].private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (folder / "key.pem").write_bytes(pem)
    return Studio(root, folder / "chain.pem", folder / "key.pem")


def read(content: bytes, media: str, root: str) -> tuple[str, dict[str, Any], set[str]]:
    """What the reader says: its verdict, the manifest, and what is wrong."""
    trust = {"trust": {"trust_anchors": root}, "verify": {"verify_trust": True}}
    context = c2pa.Context(c2pa.Settings.from_dict(trust))
    with c2pa.Reader(media, io.BytesIO(content), context=context) as reader:
        found = json.loads(reader.json())
        results = found["validation_results"]["activeManifest"]
        manifest = found["manifests"][found["active_manifest"]]
        wrong = {failure["code"] for failure in results["failure"]}
        return str(reader.get_validation_state()), manifest, wrong


def test_files_are_signed_and_a_change_is_told(
    serve: Callable[..., httpx.Client], worker: Worker, tmp_path: Path
) -> None:
    ours = studio(tmp_path)
    client = serve(**ours.settings)
    job_id = made(client, worker)
    names = ("images/0.png", "images/1.webp", "grid.png", "snapshots.gif", "mean.png")
    replies = {name: client.get(f"/jobs/{job_id}/{name}") for name in names}
    files = {name: (r.content, r.headers["content-type"]) for name, r in replies.items()}
    packed = client.get(f"/jobs/{job_id}/images.zip", params={"format": "png"}).content
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        files["zip"] = (archive.read("0001.png"), "image/png")
    for name, (content, media) in files.items():
        verdict, manifest, wrong = read(content, media, ours.root)
        assert (verdict, wrong) == ("Trusted", set()), name
        assert manifest["title"] == f"job {job_id}"
        assert manifest["signature_info"]["common_name"] == "pictures"
        [actions] = [a for a in manifest["assertions"] if a["label"].startswith("c2pa.actions")]
        assert actions["data"]["actions"][0]["digitalSourceType"] == GENERATED
        assert source_type(content) == GENERATED  # beside the other mark
    content, media = files["images/0.png"]
    assert (read_manifest(content) or {})["num_images"] == 2
    plain = Image.open(io.BytesIO(content))
    array = np.load(io.BytesIO(client.get(f"/jobs/{job_id}/images/0.npy").content))
    assert np.abs(np.asarray(plain, float) - (array[0] + 1) * 127.5).max() <= 0.5
    changed = bytearray(content)
    changed[-20] ^= 1
    verdict, _, wrong = read(bytes(changed), media, ours.root)
    assert verdict == "Invalid" and "assertion.dataHash.mismatch" in wrong
    verdict, _, wrong = read(content, media, studio(tmp_path).root)
    assert verdict == "Valid" and wrong == {"signingCredential.untrusted"}


def test_what_cannot_sign_is_told_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = studio(tmp_path)
    with pytest.raises(CredentialsError, match="DDPM_C2PA_KEY: must be set too"):
        credentials_of(Settings(c2pa_certificate=ours.chain))
    with pytest.raises(CredentialsError, match=r"DDPM_C2PA_KEY = .*none.pem: No such file"):
        credentials_of(Settings(c2pa_certificate=ours.chain, c2pa_key=tmp_path / "none.pem"))
    with pytest.raises(CredentialsError, match="no picture can be signed with these"):
        credentials_of(Settings(c2pa_certificate=ours.key, c2pa_key=ours.chain))
    with pytest.raises(CredentialsError, match="no picture can be signed with these"):
        credentials_of(Settings(**studio(tmp_path, days=-1).settings))  # it has run out
    monkeypatch.setitem(sys.modules, "c2pa", None)
    with pytest.raises(CredentialsError, match=r"pip install 'ddpm-serve\[c2pa\]'"):
        credentials_of(Settings(**ours.settings))


def test_a_certificate_that_runs_out_takes_no_picture_away(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    credentials = credentials_of(Settings(**studio(tmp_path).settings))
    assert credentials is not None
    credentials._certificates = studio(tmp_path, days=-1).chain.read_bytes()
    credentials._key = (tmp_path / "key.pem").read_bytes()
    picture = io.BytesIO()
    Image.new("L", (8, 8)).save(picture, "PNG")
    assert credentials.signed(picture.getvalue(), "png", GENERATED, "x") == picture.getvalue()
    assert "a picture is not signed" in caplog.text


def test_the_doctor_says_who_signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said() -> str:
        options = ["--data", str(tmp_path / "data"), "--port", "1"]
        return CliRunner().invoke(doctor, options).output

    assert "ok       C2PA: pictures are not signed" in said()
    ours = studio(tmp_path)
    monkeypatch.setenv("DDPM_C2PA_CERTIFICATE", str(ours.chain))
    assert "WRONG    C2PA: DDPM_C2PA_KEY: must be set too" in said()
    monkeypatch.setenv("DDPM_C2PA_KEY", str(ours.key))
    assert "ok       C2PA: pictures are signed by" in said() and "Studio of the test" in said()


def test_the_library_is_loaded_only_where_it_signs() -> None:
    code = (
        "import sys; from app.main import create_app; from jobs.settings import Settings; "
        "create_app(Settings()); assert 'c2pa' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
