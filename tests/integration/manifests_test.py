"""scripts/check_manifests finds what it is there for: each mistake, made in what is rendered or in a compose file, is told."""
import copy
import importlib.machinery
import importlib.util
import pathlib
import sys

sys.dont_write_bytecode = True
ROOT = pathlib.Path(__file__).resolve().parents[2]
loader = importlib.machinery.SourceFileLoader("check_manifests", str(ROOT / "scripts/check_manifests"))
check_manifests = importlib.util.module_from_spec(importlib.util.spec_from_loader("check_manifests", loader))
loader.exec_module(check_manifests)
sys.path.append(str(check_manifests.SCHEMAS))
try:
    import yaml
except ImportError:
    check_manifests.skip("no PyYAML (scripts/setup manifests)")


def one(documents, kind, name):
    return next(document for document in documents if document["kind"] == kind and document["metadata"]["name"] == name)


def pod(documents, kind="StatefulSet", name="tandem-decode"):
    return one(documents, kind, name)["spec"]["template"]["spec"]


def container(documents, *what):
    return pod(documents, *what)["containers"][0]


def policy(documents, name):
    return one(documents, "NetworkPolicy", name)["spec"]


def remove(documents, kind, name):
    documents.remove(one(documents, kind, name))


def root(d):
    pod(d)["securityContext"]["runAsNonRoot"] = False


def writes(d):
    del container(d)["securityContext"]["readOnlyRootFilesystem"]


def privileges(d):
    del container(d)["securityContext"]["allowPrivilegeEscalation"]


def capabilities(d):
    container(d)["securityContext"]["capabilities"]["drop"] = ["NET_RAW"]


def limits(d):
    del container(d)["resources"]["limits"]["memory"]


def probe(d):
    del container(d)["startupProbe"]


def short_start(d):
    container(d)["startupProbe"]["failureThreshold"] = 3


def life(d):
    container(d)["livenessProbe"] = {"grpc": {"port": 50051}}


def health(d):
    container(d)["readinessProbe"]["grpc"]["port"] = 50052


def grace(d):
    pod(d)["terminationGracePeriodSeconds"] = 30


def version(d):
    container(d)["image"] = "tandem:latest"


def secret(d):
    variable = next(item for item in container(d)["env"] if item["name"] == "TANDEM_CLUSTER_SECRET")
    del variable["valueFrom"]
    variable["value"] = "word"


def one_host(d):
    del pod(d)["topologySpreadConstraints"]


def alone(d):
    one(d, "Deployment", "tandem-router")["spec"]["replicas"] = 1


def no_budget(d):
    remove(d, "PodDisruptionBudget", "tandem-decode")


def no_policy(d):
    remove(d, "NetworkPolicy", "tandem-default-deny")


def open_policy(d):
    policy(d, "tandem-prefill")["ingress"].append({"ports": [{"port": 50052}]})


def foreign_policy(d):
    policy(d, "tandem-decode")["ingress"][0]["from"] = [{"namespaceSelector": {}}]


def service_address(d):
    del one(d, "Service", "tandem-router-internal")["spec"]["clusterIP"]


def not_ready(d):
    del one(d, "Service", "tandem-router-internal")["spec"]["publishNotReadyAddresses"]


def host_path(d):
    pod(d)["volumes"] = [{"name": "x", "hostPath": {"path": "/"}}]


def unknown_field(d):
    container(d)["readinessProb"] = {}


MISTAKES = [
    (root, "StatefulSet tandem-decode may run as root"),
    (writes, "StatefulSet tandem-decode may write to its root"),
    (privileges, "may gain privileges"),
    (capabilities, "keeps capabilities"),
    (limits, "has no limits of memory"),
    (probe, "has no startupProbe"),
    (short_start, "has 15 s to load its weights"),
    (life, "may be killed for what it cannot take now"),
    (health, "is not asked for its health on 50051"),
    (grace, "is killed after 30 s, while it may drain for 600.0 s"),
    (version, "has an image without a version"),
    (secret, "has TANDEM_CLUSTER_SECRET in the open"),
    (one_host, "may have all its pods on one host"),
    (alone, "Deployment tandem-router is alone"),
    (no_budget, "StatefulSet tandem-decode has no PodDisruptionBudget"),
    (no_policy, "no NetworkPolicy denies what none allows"),
    (open_policy, "NetworkPolicy tandem-prefill lets anybody in"),
    (foreign_policy, "NetworkPolicy tandem-decode lets other namespaces reach [50052]"),
    (service_address, "which has not the addresses of all routers"),
    (not_ready, "joins routers that are ready"),
    (host_path, "sees the host's /"),
]


def gpu(change):
    return lambda services: change(services["decode-1"], services)


COMPOSE_MISTAKES = [
    ("compose.yaml", lambda s: s["router"].update(read_only=False), "router may write to its root"),
    ("compose.yaml", lambda s: s["router"].update(ports=["50051:50051"]), "router publishes 50051:50051 beyond loopback"),
    ("compose.yaml", lambda s: s["router"]["environment"].update(TANDEM_CLUSTER_SECRET="x"), "that nobody chose"),
    ("compose.gpu.yaml", gpu(lambda w, s: w.update(ulimits={})), "decode-1 may not pin its memory"),
    ("compose.gpu.yaml", gpu(lambda w, s: w.update(deploy={})), "decode-1 reserves no card"),
    ("compose.gpu.yaml", gpu(lambda w, s: w.update(ipc="private")), "decode-1 does not share network, IPC and processes"),
    ("compose.gpu.yaml", gpu(lambda w, s: w.update(cpuset="")), "decode-1 is on no cores of its own"),
    ("compose.gpu.yaml", gpu(lambda w, s: w.update(volumes=["/m:/model"])), "decode-1 may write to the model"),
    ("compose.gpu.yaml", gpu(lambda w, s: s["cards"].pop("shm_size")), "or too little memory"),
    ("compose.gpu.yaml", gpu(lambda w, s: w.update(profiles=[])), "profile 1p3d has a worker on each of the cards [0, 2, 3]"),
]


def main():
    rendered = list(yaml.safe_load_all(check_manifests.render(check_manifests.KUBERNETES / "overlays/cpu")))
    missed = 0

    def expect(name, found, wanted):
        nonlocal missed
        if not any(wanted in complaint for complaint in found):
            print(f"{name}: '{wanted}' was not among {list(found)}")
            missed += 1

    for mistake, wanted in MISTAKES:
        documents = copy.deepcopy(rendered)
        mistake(documents)
        expect(mistake.__name__, list(check_manifests.check_overlay(documents)), wanted)
    for file, mistake, wanted in COMPOSE_MISTAKES:
        services = copy.deepcopy(yaml.safe_load((ROOT / "deploy/compose" / file).read_text())["services"])
        mistake(services)
        expect(file, list(check_manifests.check_compose(services)), wanted)
    tried = len(MISTAKES) + len(COMPOSE_MISTAKES)
    try:
        import kubernetes_validate
        documents = copy.deepcopy(rendered)
        unknown_field(documents)
        expect("unknown_field", list(check_manifests.check_schema(documents, kubernetes_validate)), "readinessProb")
        tried += 1
    except ImportError:
        print("unknown fields are not tried (scripts/setup manifests)")
    print(f"{tried} mistakes, {missed} not found")
    sys.exit(1 if missed else 0)


main()
