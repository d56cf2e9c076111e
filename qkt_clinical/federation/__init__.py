"""Hospitals' own machines as one federation, on NVIDIA FLARE.

What a site does lies in :mod:`~qkt_clinical.federation.site`, what the server does in
:mod:`~qkt_clinical.federation.server`, both with the library's own stages; what may leave a site in
:mod:`~qkt_clinical.federation.policy`. :mod:`~qkt_clinical.federation.flare` and
:mod:`~qkt_clinical.federation.run` are all that knows of FLARE,
beside the federated baselines of the benchmark: :mod:`~qkt_clinical.federation.peers` and
:mod:`~qkt_clinical.federation.peer_job`.
"""
