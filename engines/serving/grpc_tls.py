"""TLS of the gRPC port, as clients see it: whom they trust, and under what name.

Example: TritonClient("10.0.0.5:8001", Trust("ca.pem")) accepts a server whose certificate is for 10.0.0.5 and signed by ca.pem.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from typing import Any

from smc_plugin.errors import ConfigError


@dataclass(frozen=True)
class Trust:
    """What a client of a gRPC port with TLS must know.

    Args:
        ca: PEM file of the certificates that it trusts.
        name: that the server's certificate must be for, where it is not the address.
    """

    ca: str
    name: str | None = None


def client_arguments(trust: Trust | None) -> dict[str, Any]:
    """The arguments that tritonclient's clients take for it; none without TLS."""
    if trust is None:
        return {}
    names = [("grpc.ssl_target_name_override", trust.name)] if trust.name is not None else []
    return {"ssl": True, "root_certificates": trust.ca, "channel_args": names}


def certified_name(certificate: str) -> str:
    """A name that a certificate is for: what runs beside the server reaches it over an address, which is seldom one of them.

    Raises:
        ConfigError: it is for none.
    """
    try:
        content: dict[str, Any] = ssl._ssl._test_decode_cert(certificate)  # type: ignore[attr-defined]
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"--grpc-cert {certificate} cannot be read ({error}), expected PEM: correct the path"
        ) from None
    alternatives = [value for kind, value in content.get("subjectAltName", ()) if kind == "DNS"]
    common = [value for part in content.get("subject", ()) for key, value in part if key == "commonName"]
    names = alternatives or common
    if not names:
        raise ConfigError(
            f"--grpc-cert {certificate} names no host, expected a DNS name: issue one with subjectAltName"
        )
    return names[0].replace("*", "any")
