"""Python's clients. `serve` is a gRPC app with the health service; `check` asks through the proxy.

    clients.py check HTTPS_PORT CA GRPC_PORT
"""
import ssl
import sys
from concurrent import futures


def serve():
    import grpc
    from grpc_health.v1 import health, health_pb2, health_pb2_grpc

    server = grpc.server(futures.ThreadPoolExecutor(4))
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    servicer.set("shop", health_pb2.HealthCheckResponse.SERVING)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(f"listens on {port}", flush=True)
    server.wait_for_termination()


def by_httpx(port, ca):
    import httpx

    trust = ssl.create_default_context(cafile=ca)
    for http2 in (False, True):
        with httpx.Client(http1=not http2, http2=http2, verify=trust) as client:
            url = f"https://localhost:{port}"
            answer = client.get(f"{url}/")
            assert (answer.status_code, answer.http_version) == (200, "HTTP/2" if http2 else "HTTP/1.1"), answer
            body = b"x" * 3_000_000
            answer = client.post(f"{url}/upload", content=(body[n : n + 65536] for n in range(0, len(body), 65536)))
            assert answer.status_code == 200 and str(len(body)) in answer.text, answer.text
            print(f"passed: httpx {answer.http_version}")


def by_grpcio(port):
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        ask = health_pb2.HealthCheckRequest
        serving = health_pb2.HealthCheckResponse.SERVING
        assert stub.Check(ask(service="shop"), timeout=5).status == serving
        try:
            stub.Check(ask(service="nobody"), timeout=5)
            raise AssertionError("an unknown service is an error")
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.NOT_FOUND, error
        watch = stub.Watch(ask(service="shop"))
        assert next(iter(watch)).status == serving
        watch.cancel()
        print("passed: grpcio, grpc.health.v1")


if sys.argv[1] == "serve":
    serve()
else:
    by_httpx(sys.argv[2], sys.argv[3])
    by_grpcio(sys.argv[4])
    print("all passed")
