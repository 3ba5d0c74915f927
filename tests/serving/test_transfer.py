"""Downloads and uploads against a server on 127.0.0.1, and addresses that no job may reach."""

import ipaddress
import socket

import pytest
from website import LOCAL, Site, serving

from dust3r_sfm.errors import InputError
from dust3r_sfm.serving.limits import Allowance, Limits, TimeLimitError
from dust3r_sfm.serving.transfer import Transfer, is_public, without_query


@pytest.fixture
def site():
    with serving() as address:
        yield address


@pytest.fixture
def local():
    return Transfer(Allowance(Limits()), LOCAL)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"),
        *("224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fc00::1", "ff02::1", "::ffff:10.0.0.1"),
        *("64:ff9b::7f00:1", "2002:7f00:1::", "fec0::1", "::127.0.0.1"),
    ],
)
def test_addresses_that_are_not_the_internets_are_told_apart(address):
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_the_internets_addresses_are_public(address):
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "url",
    [
        *("https://127.0.0.1/a.jpg", "https://localhost/a.jpg", "https://2130706433/a.jpg", "https://0x7f.1/a.jpg"),
        *("https://169.254.169.254/latest/meta-data", "https://[::1]/a.jpg", "https://[::ffff:127.0.0.1]/a.jpg"),
        *("http://127.0.0.1/a.jpg", "https://10.0.0.1:8443/"),
    ],
)
def test_private_addresses_are_never_connected_to(url, tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", None)
    with pytest.raises(InputError, match="is not on the public internet"):
        Transfer(Allowance(Limits())).download(url, tmp_path / "a")
    (tmp_path / "b").write_bytes(b"b")
    with pytest.raises(InputError, match="is not on the public internet"):
        Transfer(Allowance(Limits())).upload(tmp_path / "b", url)


@pytest.mark.parametrize("target", ["http://127.0.0.2/x", "https://169.254.169.254/x", "file:///etc/passwd"])
def test_a_redirect_goes_through_the_same_check(site, local, tmp_path, target):
    with pytest.raises(InputError, match=r"is not on the public internet|expected an address such as https"):
        local.download(f"{site}/to/{target}", tmp_path / "a")


def test_what_is_not_encrypted_is_refused_also_after_a_redirect(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", ("8.8.8.8", 80))])
    with pytest.raises(InputError, match="is not encrypted: expected https"):
        Transfer(Allowance(Limits())).download("http://photos.example/a.jpg?key=1", tmp_path / "a")


def test_a_name_is_resolved_once_and_the_checked_address_is_connected_to(site, local, tmp_path, monkeypatch):
    """DNS rebinding: the second answer to the same question would be another address."""
    port = int(site.rsplit(":", 1)[1])
    resolve, asked = socket.getaddrinfo, []

    def rebinding(host, *arguments, **options):
        if host != "photos.example":
            return resolve(host, *arguments, **options)
        asked.append(host)
        return resolve("127.0.0.1" if len(asked) == 1 else "127.0.0.9", *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    local.download(f"http://photos.example:{port}/a.png", tmp_path / "a")
    assert asked == ["photos.example"]
    assert Site.asked == [("/a.png", f"photos.example:{port}")]


def test_one_private_address_among_public_ones_is_enough_to_refuse(tmp_path, monkeypatch):
    found = [(2, 1, 6, "", (address, 443)) for address in ("8.8.8.8", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(InputError, match="is not on the public internet"):
        Transfer(Allowance(Limits())).download("https://photos.example/a.jpg", tmp_path / "a")


def test_files_come_whole_with_their_type_over_redirects_and_after_a_passing_error(site, local, tmp_path):
    assert local.download(f"{site}/later", tmp_path / "a") == "image/png"
    assert local.download(f"{site}/to//to//to//a.png?key=secret", tmp_path / "b") == "image/png"
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == b"a photo"


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("/gone?key=secret", "answered 404 Not Found"),
        ("/cut?key=secret", "ended after 3 of 9 bytes"),
        ("/to//to//to//to//to//to//x", "leads on more than 5 times"),
    ],
)
def test_what_cannot_be_fetched_is_a_sentence_without_the_key(site, local, tmp_path, path, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        local.download(site + path, tmp_path / "a")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        *("https://", "https:///a", "https://h:x/", "https://me:pw@8.8.8.8/a"),
        *("https://[abc/a.jpg", "https://\u2100.example/a.jpg", "https://a b/a.jpg"),
    ],
)
def test_what_is_no_address_is_a_sentence(local, tmp_path, url):
    with pytest.raises(InputError):
        local.download(url, tmp_path / "a")
    with pytest.raises(InputError):
        local.check(url)


def test_a_redirect_to_what_is_no_address_is_a_sentence(site, local, tmp_path):
    with pytest.raises(InputError, match="leads on to what is no address"):
        local.download(f"{site}/to/https://[abc/x", tmp_path / "a")


def test_blanks_and_letters_of_any_language_in_an_address_are_encoded_and_the_rest_is_left(site, local, tmp_path):
    local.download(f"{site}/\u5bfa b%20c.png?key=\u00e4/+&x=%2F", tmp_path / "a")
    local.download(f"{site}/to//%C3%A4 b.png", tmp_path / "a")
    (tmp_path / "result.zip").write_bytes(b"result")
    local.upload(tmp_path / "result.zip", f"{site}/\u00e4.zip")
    assert [path for path, _ in Site.asked if not path.startswith("/to/")] == [
        "/%E5%AF%BA%20b%20c.png?key=%C3%A4/+&x=%2F",
        "/%C3%A4%20b.png",
    ]
    assert list(Site.uploads) == ["/%C3%A4.zip"]


def test_a_download_that_is_tried_again_counts_once(site, tmp_path):
    """`/cut` sends three bytes of nine in each of three tries."""
    transfer = Transfer(Allowance(Limits(max_gb=10e-9)), LOCAL)
    with pytest.raises(InputError, match="ended after 3 of 9 bytes"):
        transfer.download(f"{site}/cut", tmp_path / "a")
    transfer.download(f"{site}/a.png", tmp_path / "a")
    with pytest.raises(InputError, match="larger than"):
        transfer.download(f"{site}/a.png", tmp_path / "a")


def test_a_host_that_does_not_answer_is_a_sentence(local, tmp_path, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(InputError, match="could not be read: ConnectionRefusedError"):
            local.download(f"http://127.0.0.1:{closed.getsockname()[1]}/a", tmp_path / "a")


def test_uploads_arrive_and_refusals_are_sentences_without_the_key(site, local, tmp_path):
    (tmp_path / "result.zip").write_bytes(b"result")
    local.upload(tmp_path / "result.zip", f"{site}/bucket/result.zip?key=secret")
    assert Site.uploads == {"/bucket/result.zip?key=secret": b"result"}
    with pytest.raises(InputError, match="refused the upload: 403") as error:
        local.upload(tmp_path / "result.zip", f"{site}/no?key=secret")
    assert "secret" not in str(error.value)


def test_size_and_time_are_limited(site, tmp_path):
    with pytest.raises(InputError, match="larger than 5e-09 GB"):
        Transfer(Allowance(Limits(max_gb=5e-9)), LOCAL).download(f"{site}/a.png", tmp_path / "a")
    with pytest.raises(TimeLimitError):
        Transfer(Allowance(Limits(max_seconds=0.0)), LOCAL).download(f"{site}/a.png", tmp_path / "a")


def test_a_server_that_never_ends_is_cut_off_when_the_time_is_over(site, tmp_path):
    with pytest.raises(TimeLimitError, match="longer than 0.2 s"):
        Transfer(Allowance(Limits(max_seconds=0.2)), LOCAL).download(f"{site}/endless", tmp_path / "a")


def test_the_query_of_an_address_is_not_shown():
    assert without_query("https://a.example/b/c.zip?X-Signature=1#d") == "https://a.example/b/c.zip"
