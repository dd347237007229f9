"""An ensemble behind HTTP: requests and draws share passes."""

from ..runtime.packages import needs

with needs("selfensemble[serve]"):
    import fastapi  # noqa: F401
    import PIL  # noqa: F401
    import prometheus_client  # noqa: F401
    import python_multipart  # noqa: F401
    import uvicorn  # noqa: F401
