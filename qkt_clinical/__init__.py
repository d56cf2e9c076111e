"""qkt-clinical: learn a diagnosis from other hospitals' models, without any image leaving a site."""

__version__ = "0.1.0"
