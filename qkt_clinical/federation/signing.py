"""Signatures of teachers, end to end: whoever uses one can know that its site made it, whoever kept it.

Ed25519 (RFC 8032) by the library ``cryptography``. What is signed is the card, which holds the digest of the
weights. The mask is not: a site may show parts of it, and anybody can compute it from the weights.
"""

from __future__ import annotations

from pathlib import Path

from qkt_clinical.errors import BundleError, ConfigError

PURPOSE = b"qkt-clinical teacher\0"
"""Before what is signed, so that a signature serves for nothing else."""


def sign(key: Path, card: bytes) -> bytes:
    """Signature of a card.

    Args:
        key: Ed25519 private key as PEM, without a password: ``openssl genpkey -algorithm ed25519``.

    Raises:
        ConfigError: not such a key, code ``signing-key``.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        found = load_pem_private_key(key.read_bytes(), password=None)
    except (OSError, ValueError, TypeError):
        found = None
    if not isinstance(found, Ed25519PrivateKey):
        raise ConfigError(
            "no Ed25519 private key",
            remedy="Make one with 'openssl genpkey -algorithm ed25519'; docs/federation.md says how.",
            file=key,
            code="signing-key",
        )
    return found.sign(PURPOSE + card)


def check_signature(key: str, card: bytes, signature: bytes | None, site: str) -> None:
    """Let a card pass that its site has signed.

    Args:
        key: Ed25519 public key, 64 hexadecimal digits.

    Raises:
        BundleError: not signed, or not by this key, code ``bundle-signature``.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))
        public.verify(signature or b"", PURPOSE + card)
    except InvalidSignature:
        raise BundleError(
            "is not signed" if not signature else "is signed by somebody else",
            remedy="Ask the site for its public key by telephone; nothing of the teacher was used.",
            site=site,
            code="bundle-signature",
        ) from None
