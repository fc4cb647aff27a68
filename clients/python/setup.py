"""Makes the gRPC stubs from the .proto file of this tree while the package is built."""
import pathlib
import shutil
import subprocess
import sys

from setuptools import setup
from setuptools.command.build_py import build_py

PROTO = pathlib.Path(__file__).resolve().parent.parent.parent / "proto"


def protoc():
    try:
        import grpc_tools  # noqa: F401
        return [sys.executable, "-m", "grpc_tools.protoc"]
    except ImportError:
        plugin = shutil.which("grpc_python_plugin")
        if plugin is None or shutil.which("protoc") is None:
            sys.exit("tandem-client: neither grpcio-tools nor protoc with grpc_python_plugin is installed")
        return ["protoc", "--plugin=protoc-gen-grpc_python=" + plugin]


class BuildWithStubs(build_py):
    def run(self):
        super().run()
        subprocess.run(protoc() + [f"--proto_path={PROTO}", f"--python_out={self.build_lib}",
                                   f"--grpc_python_out={self.build_lib}", "tandem/v1/inference.proto"], check=True)


setup(cmdclass={"build_py": BuildWithStubs})
