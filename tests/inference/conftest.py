import pytest

pytest.importorskip("tenseal")
pytest.importorskip("grpc_health")
