"""The manifests for Kubernetes: every field against the schemas, every command and port against the programs.

Nothing is applied: no cluster is at hand. ``make test-servers`` runs what needs ``kubernetes-validate``.
"""

from __future__ import annotations

import json
import shlex
from copy import deepcopy
from importlib.metadata import version
from importlib.util import find_spec

import pytest

from cmt_edge.deploy.cli import verify
from helpers.paths import ROOT

yaml = pytest.importorskip("yaml", reason="needs kubernetes-validate: make test-servers")
jsonschema = pytest.importorskip("jsonschema", reason="needs kubernetes-validate: make test-servers")
schemas = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate: make test-servers")

FOLDER = ROOT / "examples" / "kubernetes"
OLDEST = "1.30"
"""The oldest Kubernetes whose schemas the manifests keep: there a pod may sleep before it stops."""
NEWEST = ".".join(version("kubernetes-validate").split(".")[:2])
"""The newest Kubernetes that the package has schemas of."""
KUBERAY = json.loads((ROOT / "tests" / "data" / "kuberay_rayjob.json").read_text())["spec"]
"""What KubeRay allows in the spec of a RayJob."""


def read(name: str) -> list[dict]:
    return list(yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8")))


SERVING = {entry["kind"]: entry for entry in read("serving.yaml")}
(JOB,) = read("evaluation.yaml")
CLUSTER = JOB["spec"]["rayClusterSpec"]
TEMPLATES = [CLUSTER["headGroupSpec"]["template"], *(g["template"] for g in CLUSTER["workerGroupSpecs"])]
SUBMITTER = JOB["spec"]["submitterPodTemplate"]
PODS = [*TEMPLATES, SUBMITTER, SERVING["Deployment"]["spec"]["template"]]


def validate(document: dict, of: str) -> None:
    """Raise an error for a field that Kubernetes does not know, or of a wrong type."""
    schemas.validate(document, of, strict=True)


def validate_job(job: dict, of: str) -> None:
    """As :func:`validate`, for KubeRay's own kind, whose pods are Kubernetes'."""
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    jsonschema.validate(job["spec"], KUBERAY)
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for template in [job["spec"]["submitterPodTemplate"], *(group["template"] for group in groups)]:
        pods = {
            "apiVersion": "v1",
            "kind": "PodTemplate",
            "metadata": {"name": "x"},
            "template": template,
        }
        validate(pods, of)


@pytest.mark.parametrize("of", [OLDEST, NEWEST])
@pytest.mark.parametrize("kind", SERVING)
def test_what_serves_keeps_the_schemas(kind, of):
    validate(SERVING[kind], of)


@pytest.mark.parametrize("of", [OLDEST, NEWEST])
def test_the_evaluation_keeps_the_schemas(of):
    validate_job(JOB, of)


def rename(entry: dict, old: str, new: str) -> None:
    entry[new] = entry.pop(old)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda job: rename(job["spec"], "entrypoint", "entryPoint"),
        lambda job: job["spec"].update(submissionMode=1),
        lambda job: job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        lambda job: job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0].pop("groupName"),
        lambda job: rename(
            job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0],
            "volumeMounts",
            "volumeMount",
        ),
    ],
)
def test_a_wrong_job_is_found(spoil):
    job = deepcopy(JOB)
    spoil(job)
    with pytest.raises(jsonschema.ValidationError):
        validate_job(job, NEWEST)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda spec: spec.update(replicas="2"),
        lambda spec: rename(spec, "selector", "select"),
        lambda spec: rename(spec["template"]["spec"]["containers"][0], "livenessProbe", "lifenessProbe"),
    ],
)
def test_a_wrong_deployment_is_found(spoil):
    deployment = deepcopy(SERVING["Deployment"])
    spoil(deployment["spec"])
    with pytest.raises(jsonschema.ValidationError):
        validate(deployment, NEWEST)


# --- what no schema knows -------------------------------------------------------------------------


@pytest.mark.parametrize("template", PODS)
def test_every_pod_is_limited_and_has_few_rights(template):
    pod = template["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in pod["containers"]:
        rights, sizes = container["securityContext"], container["resources"]
        assert rights["allowPrivilegeEscalation"] is False
        assert rights["capabilities"] == {"drop": ["ALL"]}
        assert set(sizes["limits"]) == set(sizes["requests"]) == {"cpu", "memory", "ephemeral-storage"}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    scratch = [volume["emptyDir"] for volume in pod["volumes"] if "emptyDir" in volume]
    assert all("sizeLimit" in folder for folder in scratch), "or it may fill the node"


def test_the_service_writes_to_nothing_but_its_scratch_folder():
    pod = SERVING["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    writable = [mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")]
    assert writable == ["/tmp"]


def test_everything_finds_the_pods():
    labels = SERVING["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert SERVING["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert SERVING["Service"]["spec"]["selector"] == labels
    assert SERVING["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert SERVING["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    assert SERVING["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == "cmt-edge"
    assert SERVING["Deployment"]["metadata"]["name"] == "cmt-edge"
    budget = SERVING["PodDisruptionBudget"]["spec"]["minAvailable"]
    assert budget < SERVING["HorizontalPodAutoscaler"]["spec"]["minReplicas"], "or no node can be drained"


def test_ports_and_probes_are_those_of_the_service():
    (container,) = SERVING["Deployment"]["spec"]["template"]["spec"]["containers"]
    (port,) = container["ports"]
    assert container["args"][:2] == ["--port", str(port["containerPort"])]
    assert f"EXPOSE {port['containerPort']}" in (ROOT / "examples/container/Dockerfile").read_text()
    source = (ROOT / "examples" / "service" / "service.py").read_text()
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container[probe]["httpGet"]
        assert asked["port"] == port["name"]
        assert f'@app.get("{asked["path"]}")' in source
    assert SERVING["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    assert SERVING["NetworkPolicy"]["spec"]["ingress"][0]["ports"][0]["port"] == port["name"]


def test_the_service_takes_its_flags_and_has_time_to_stop(example):
    needed = ("fastapi", "uvicorn", "prometheus_client")
    if not all(map(find_spec, needed)):
        pytest.skip("needs the extra examples")
    service = example("service/service.py")
    pod = SERVING["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    args = service.build_parser().parse_args(["--host", "0.0.0.0", "/bundle", *container["args"]])
    assert container["resources"]["limits"]["cpu"] == str(args.threads * args.workers)
    assert "/bundle" in [mount["mountPath"] for mount in container["volumeMounts"]]
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= pause + service.STOP_S


def test_the_evaluation_is_a_command_of_ours():
    command = shlex.split(JOB["spec"]["entrypoint"])
    assert command[:2] == ["cmt-edge", "verify"]
    parser = verify.build_parser()
    known = {flag for action in parser.list_actions() for flag in action.option_strings}
    if "--ray" not in known:
        pytest.skip("this version has no verify --ray")
    args = parser.parse_args(command[2:])
    assert args.ray == "auto"
    mounts = [mount["mountPath"] for mount in TEMPLATES[0]["spec"]["containers"][0]["volumeMounts"]]
    for path in (args.bundle, args.data, args.answers):
        assert any(str(path).startswith(f"{mount}/") for mount in mounts)


def test_the_pods_of_ray_are_alike_and_of_one_version():
    containers = [template["spec"]["containers"][0] for template in TEMPLATES]
    assert len({template["spec"]["containers"][0]["image"] for template in [*TEMPLATES, SUBMITTER]}) == 1
    assert SUBMITTER["spec"]["restartPolicy"] == "Never", "KubeRay makes a Job of it"
    assert all(container["volumeMounts"] == containers[0]["volumeMounts"] for container in containers)
    assert {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"} in containers[0]["env"]
    assert f"Ray {CLUSTER['rayVersion']} " in (FOLDER / "evaluation.yaml").read_text()
