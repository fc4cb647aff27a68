"""A gRPC client that shares no code with Tandem: stubs are generated here from the .proto files.

usage: foreign_client.py PROTO_DIR HOST:PORT reference.json
Replays every case of the reference (greedy tokens, logprobs, prompt logprobs) and checks that reflection lists every service.
Prints one line per problem and exits 1, or "ok N cases".
"""
import json
import os
import subprocess
import sys
import tempfile

import grpc

# float32 logits within 1e-4 relative L2 of float64 leave logprobs of these small models within this.
LOGPROB_TOLERANCE = 1e-3
# What a client may see: nothing internal, and not the operator's services.
SERVICES = {"tandem.v1.Inference", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


def generate_stubs(proto_dir, out):
    grpc_proto = "/usr/share/grpc-proto"
    plugin = subprocess.run(["which", "grpc_python_plugin"], check=True, capture_output=True, text=True).stdout.strip()
    files = [os.path.join(proto_dir, "tandem/v1/inference.proto"), os.path.join(proto_dir, "tandem/v1/admin.proto"),
             os.path.join(grpc_proto, "grpc/reflection/v1alpha/reflection.proto")]
    subprocess.run(["protoc", "-I", proto_dir, "-I", grpc_proto, "--python_out", out, "--grpc_out", out,
                    "--plugin=protoc-gen-grpc=" + plugin] + files, check=True)
    # Debian's python3-grpcio has a package of that name; the generated reflection package must not hide it.
    os.rename(os.path.join(out, "grpc/reflection/v1alpha/reflection_pb2.py"), os.path.join(out, "reflection_pb2.py"))
    sys.path.insert(0, out)


def check_reflection(channel, problems):
    import reflection_pb2
    call = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
                                 request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
                                 response_deserializer=reflection_pb2.ServerReflectionResponse.FromString)
    reply = next(iter(call(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=10)))
    listed = {service.name for service in reply.list_services_response.service}
    if listed != SERVICES:
        problems.append(f"reflection lists {sorted(listed)}, not {sorted(SERVICES)}")


def close(got, want):
    return len(got) == len(want) and all(abs(g - w) <= LOGPROB_TOLERANCE * max(1, abs(w)) for g, w in zip(got, want))


def check_case(stub, pb, index, case, problems):
    request = pb.GenerateRequest()
    request.token_ids.ids.extend(case["prompt_token_ids"])
    request.sampling.temperature = 0
    request.sampling.repetition_penalty = 1
    request.sampling.max_tokens = len(case["greedy"])
    request.sampling.ignore_eos = True
    request.sampling.logprobs = 1
    request.sampling.prompt_logprobs = 0
    tokens, logprobs, prompt_logprobs, last = [], [], [], None
    for last in stub.Generate(request, timeout=120):
        tokens += list(last.token_ids)
        logprobs += [entry.logprob for entry in last.logprobs]
        prompt_logprobs += [entry.logprob for entry in last.prompt_logprobs]
        if last.usage.prompt_tokens != len(case["prompt_token_ids"]):
            problems.append(f"case {index}: usage says {last.usage.prompt_tokens} prompt tokens")
    if tokens != case["greedy"]:
        problems.append(f"case {index} ({len(case['prompt_token_ids'])} tokens): greedy {tokens}, wanted {case['greedy']}")
    if not close(logprobs, case["greedy_logprobs"]):
        problems.append(f"case {index}: logprobs {logprobs}, wanted {case['greedy_logprobs']}")
    # A reference may hold a leading placeholder for the first prompt token, which has no logprob.
    want = [value for value in case.get("prompt_logprobs", []) if value is not None]
    if want and not close(prompt_logprobs, want):
        problems.append(f"case {index}: prompt logprobs {prompt_logprobs[:4]}..., wanted {want[:4]}...")
    if last is None or last.finish_reason != pb.FINISH_REASON_LENGTH or not last.HasField("timing"):
        problems.append(f"case {index}: no finish reason or timing on the last message")
    elif last.timing.transport != "shm" or last.timing.kv_bytes == 0:
        problems.append(f"case {index}: not shipped: transport {last.timing.transport}, {last.timing.kv_bytes} bytes")


def main():
    proto_dir, address, reference = sys.argv[1:4]
    problems = []
    with tempfile.TemporaryDirectory() as out:
        generate_stubs(proto_dir, out)
        from tandem.v1 import inference_pb2, inference_pb2_grpc
        with open(reference) as file:
            cases = json.load(file)["cases"]
        with grpc.insecure_channel(address) as channel:
            check_reflection(channel, problems)
            stub = inference_pb2_grpc.InferenceStub(channel)
            for index, case in enumerate(cases):
                check_case(stub, inference_pb2, index, case, problems)
    for problem in problems:
        print(problem)
    if problems:
        return 1
    print(f"ok {len(cases)} cases")
    return 0


if __name__ == "__main__":
    sys.exit(main())
