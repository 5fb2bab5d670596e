"""Downloads of one file from a server on the loopback interface that cuts, delays, redirects and lies."""

import hashlib
import logging
import re
import time

import pytest

from dino_hf.common import file_downloads
from dino_hf.common.file_downloads import DownloadError, download_file
from file_server import serve

CONTENT = bytes(range(256)) * 300  # 76,800 bytes
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server():
    with serve() as server:
        server.files["/file.pth"] = CONTENT
        yield server


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(file_downloads, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(file_downloads, "_READ", 2.0)


def download(server, tmp_path, **settings):
    return download_file(f"{server.address}/file.pth", tmp_path / "file.pth", **settings)


def left(tmp_path) -> set[str]:
    return {path.name for path in tmp_path.iterdir()}


def test_a_file_comes_whole_with_its_digest_and_its_progress(server, tmp_path):
    seen = []
    found = download(
        server,
        tmp_path,
        sha256=DIGEST[:8],
        size=len(CONTENT),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert found == DIGEST
    assert (tmp_path / "file.pth").read_bytes() == CONTENT
    assert left(tmp_path) == {"file.pth"}
    assert seen[0] == (0, len(CONTENT))
    assert seen[-1] == (len(CONTENT), len(CONTENT))


def test_a_cut_transfer_continues_where_it_broke_off(server, tmp_path):
    server.plans = [("cut", 20_000), ("cut", 30_000)]
    assert download(server, tmp_path) == DIGEST
    assert server.ranges == [None, "bytes=20000-", "bytes=50000-"]
    assert all(headers["If-Range"] == server.tag for _, headers in server.requests[1:])


def test_an_interrupted_call_is_continued_by_the_next_one(server, tmp_path):
    server.plans = [("cut", 20_000), *[("status", 503)] * 3]
    with pytest.raises(DownloadError, match=r"503 .*4 attempts"):
        download(server, tmp_path)
    assert left(tmp_path) == {"file.pth.part", "file.pth.part.json"}
    assert download(server, tmp_path) == DIGEST
    assert server.ranges[-1] == "bytes=20000-"


def test_a_file_that_changed_starts_again(server, tmp_path):
    server.plans = [("cut", 20_000), ("status", 503), ("status", 503), ("status", 503)]
    with pytest.raises(DownloadError):
        download(server, tmp_path)
    changed = CONTENT[::-1]
    server.files["/file.pth"], server.tag = changed, '"two"'
    assert download(server, tmp_path) == hashlib.sha256(changed).hexdigest()


@pytest.mark.parametrize("changes", [{"has_ranges": False}, {"tag": None}, {"tag": 'W/"weak"'}])
def test_a_server_without_ranges_or_tags_starts_again(changes, server, tmp_path):
    for name, value in changes.items():
        setattr(server, name, value)
    server.plans = [("cut", 20_000)]
    assert download(server, tmp_path) == DIGEST
    if "tag" in changes:  # without a strong tag, the file may have changed meanwhile
        assert server.ranges == [None, None]


def test_a_part_from_another_address_is_not_continued(server, tmp_path):
    server.files["/other.pth"] = CONTENT[::-1]
    server.plans = [("cut", 20_000), *[("status", 503)] * 3]
    with pytest.raises(DownloadError):
        download_file(f"{server.address}/other.pth", tmp_path / "file.pth")
    assert download(server, tmp_path) == DIGEST
    assert server.ranges[-1] is None


def test_a_part_that_is_complete_is_not_transferred_again(server, tmp_path):
    server.plans = [("cut", 20_000), *[("status", 503)] * 3]
    with pytest.raises(DownloadError):
        download(server, tmp_path)
    (tmp_path / "file.pth.part").write_bytes(CONTENT)
    assert download(server, tmp_path) == DIGEST
    assert server.ranges[-1] == f"bytes={len(CONTENT)}-"


def test_a_part_that_is_longer_than_the_file_starts_again(server, tmp_path):
    server.plans = [("cut", 20_000), *[("status", 503)] * 3]
    with pytest.raises(DownloadError):
        download(server, tmp_path)
    (tmp_path / "file.pth.part").write_bytes(CONTENT + b"more")
    assert download(server, tmp_path) == DIGEST


def test_another_range_than_requested_starts_again(server, tmp_path):
    server.plans = [("cut", 20_000), ("wrong_range",)]
    assert download(server, tmp_path) == DIGEST


def test_a_damaged_record_of_a_part_starts_again(server, tmp_path):
    (tmp_path / "file.pth.part").write_bytes(b"something")
    (tmp_path / "file.pth.part.json").write_text("{")
    assert download(server, tmp_path) == DIGEST


@pytest.mark.parametrize("expected", [{"sha256": "0" * 8}, {"size": 5}])
def test_another_file_than_expected_is_an_error_and_does_not_stay(expected, server, tmp_path):
    with pytest.raises(DownloadError, match=r"0{8}.*expected" if "sha256" in expected else r"76,800 bytes.* 5 are"):
        download(server, tmp_path, **expected)
    assert left(tmp_path) == set()
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [401, 403, 404, 410, 451])
def test_a_refusal_is_not_tried_again(status, server, tmp_path):
    server.plans = [("status", status)]
    with pytest.raises(DownloadError, match=f"answers {status} "):
        download(server, tmp_path)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_busy_server_is_tried_again(status, server, tmp_path):
    server.plans = [("status", status)] * 2
    assert download(server, tmp_path) == DIGEST
    assert len(server.requests) == 3


def test_attempts_without_progress_end(server, tmp_path):
    server.plans = [("status", 500)] * 40
    with pytest.raises(DownloadError, match=r"500 .*4 attempts"):
        download(server, tmp_path)
    assert len(server.requests) == 4


def test_the_wait_that_a_server_asks_for_is_kept(server, tmp_path, caplog):
    server.plans = [("status", 429, {"Retry-After": "1"})]
    start = time.monotonic()
    with caplog.at_level(logging.WARNING):
        assert download(server, tmp_path) == DIGEST
    assert time.monotonic() - start >= 1
    assert "429" in caplog.text
    assert "in 1 s" in caplog.text


@pytest.mark.parametrize(("asked", "expected"), [("9999999", 120.0), ("soon", 0.01), ("-5", 0.01)])
def test_a_wait_without_reason_is_bounded(asked, expected, server, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(file_downloads, "time", _Clock(waits))
    server.plans = [("status", 503, {"Retry-After": asked})]
    assert download(server, tmp_path) == DIGEST
    assert waits == [expected]


class _Clock:
    """The module `time` without waiting."""

    monotonic = staticmethod(time.monotonic)

    def __init__(self, waits: list[float]):
        self.sleep = waits.append


def test_redirects_are_followed_also_relative_ones(server, tmp_path):
    server.plans = [("redirect", "/there.pth"), ("redirect", f"{server.address}/file.pth")]
    assert download(server, tmp_path) == DIGEST
    assert [path for path, _ in server.requests] == ["/file.pth", "/there.pth", "/file.pth"]


@pytest.mark.parametrize("target", ["ftp://127.0.0.1/a.pth", "file:///etc/hostname"])
def test_redirects_lead_only_to_web_addresses(target, server, tmp_path):
    server.plans = [("redirect", target)]
    with pytest.raises(DownloadError, match="not a web address"):
        download(server, tmp_path)


def test_redirects_lead_not_from_a_public_server_to_the_local_network(server, tmp_path, monkeypatch):
    hosts = iter([True, False])  # the target is local, the origin is not
    monkeypatch.setattr(file_downloads, "is_local", lambda host: next(hosts))
    server.plans = [("redirect", "/file.pth")]
    with pytest.raises(DownloadError, match="local network"):
        download(server, tmp_path)
    assert len(server.requests) == 1


def test_redirects_do_not_leave_https():
    with pytest.raises(DownloadError, match="from https to http"):
        file_downloads._check_redirect("https://weights.example/a.pth", "http://weights.example/a.pth")


def test_redirects_that_lead_in_a_circle_end(server, tmp_path):
    server.plans = [("redirect", "/file.pth")] * 40
    with pytest.raises(DownloadError, match="more than 10 times"):
        download(server, tmp_path)
    assert len(server.requests) == 10


@pytest.mark.parametrize(
    ("plan", "reason"), [(("slow", 0.02), r"bytes came within 0"), (("slow_header", 0.02), r"did not answer within 0")]
)
def test_slow_answers_are_given_up(plan, reason, server, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(file_downloads, "_STALL_SECONDS", 0.3)
    monkeypatch.setattr(file_downloads, "_FIRST_ANSWER", 0.4)
    server.plans = [plan]
    with caplog.at_level(logging.WARNING):
        assert download(server, tmp_path) == DIGEST
    assert caplog.records

    assert re.search(reason, caplog.text)


def test_a_server_without_a_word_is_given_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr(file_downloads, "_READ", 0.1)
    server.plans = [("slow", 1.0)]
    assert download(server, tmp_path) == DIGEST


def test_an_endless_body_ends_at_the_largest_size(server, tmp_path, monkeypatch):
    monkeypatch.setattr(file_downloads, "LARGEST_FILE", 100_000)
    server.plans = [("endless",)]
    with pytest.raises(DownloadError, match="more than 100,000 bytes"):
        download(server, tmp_path)
    assert left(tmp_path) == set()


def test_an_endless_body_ends_at_the_expected_size(server, tmp_path):
    server.plans = [("endless",)]
    with pytest.raises(DownloadError, match="more than 76,800 bytes"):
        download(server, tmp_path, size=len(CONTENT))


def test_a_file_larger_than_the_largest_is_refused_before_its_body(server, tmp_path, monkeypatch):
    monkeypatch.setattr(file_downloads, "LARGEST_FILE", 70_000)
    with pytest.raises(DownloadError, match=r"76,800 bytes.*70,000"):
        download(server, tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [("Content_Type", "text/html; charset=utf-8", "web page"), ("Content_Encoding", "gzip", "compressed")],
)
def test_another_content_than_the_file_is_refused(name, value, reason, server, tmp_path):
    server.plans = [("header", name, value)]
    with pytest.raises(DownloadError, match=reason):
        download(server, tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "reason"), [("Content_Type", "Text/HTML", "web page"), ("Content_Encoding", "gzip", "compressed")]
)
def test_another_content_than_the_rest_of_the_file_is_refused(name, value, reason, server, tmp_path):
    server.plans = [("cut", 20_000), ("header", name, value)]
    with pytest.raises(DownloadError, match=reason):
        download(server, tmp_path)


def test_a_full_disk_is_noticed_before_the_transfer(server, tmp_path, monkeypatch):
    monkeypatch.setattr(
        file_downloads.shutil, "disk_usage", lambda folder: file_downloads.shutil._ntuple_diskusage(9, 9, 100_000)
    )
    assert download(server, tmp_path) == DIGEST
    with pytest.raises(DownloadError, match="are free"):
        download_file(f"{server.address}/file.pth", tmp_path / "other.pth", spare=1.0)


def test_an_answer_that_is_not_http_is_an_error(server, tmp_path):
    server.plans = [("no_http",)] * 4
    with pytest.raises(DownloadError):
        download(server, tmp_path)


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:1/file.pth", "http://[half/file.pth", "ftp://127.0.0.1/file.pth"]
)
def test_addresses_that_cannot_be_reached_are_errors(address, tmp_path):
    with pytest.raises(DownloadError):
        download_file(address, tmp_path / "file.pth")


def test_a_server_that_cannot_be_reached_is_not_tried_again(tmp_path, caplog):
    for address in ("http://127.0.0.1:1/file.pth", "http://no-such-server.invalid/file.pth"):
        with pytest.raises(DownloadError, match="cannot be reached"):
            download_file(address, tmp_path / "file.pth")
    assert caplog.records == []


def test_a_server_that_is_gone_later_is_tried_again(server, tmp_path, monkeypatch):
    """After the first attempt, the network is known to work."""
    session, failures = file_downloads.requests.Session.get, [file_downloads.NewConnectionError(None, "gone")]

    def get(*arguments, **settings):
        if server.requests and failures:
            raise file_downloads.requests.ConnectionError(failures.pop())
        return session(*arguments, **settings)

    monkeypatch.setattr(file_downloads.requests.Session, "get", get)
    server.plans = [("cut", 20_000)]
    assert download(server, tmp_path) == DIGEST
    assert failures == []


def test_a_proxy_of_the_environment_is_used(server, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", server.address)
    monkeypatch.setenv("no_proxy", "")
    server.files["http://weights.example/file.pth"] = CONTENT  # a proxy gets the whole address
    assert download_file("http://weights.example/file.pth", tmp_path / "file.pth") == DIGEST
