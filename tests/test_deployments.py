"""The manifests of docs/examples: valid by the schemas of their programs, and with the command of an export."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorafit.export.serving.adapters_folder import SCRIPT_TEXT

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
COMPOSE, KUBERNETES = EXAMPLES / "vllm-compose.yaml", EXAMPLES / "vllm-kubernetes.yaml"
COMMAND = ["vllm", "serve", "--config", "serving.yaml"]
ARGUMENTS = ["--host", "0.0.0.0", "--port", "8000"]


def objects() -> dict[str, Any]:
    """The objects of the Kubernetes manifest by kind."""
    return {each["kind"]: each for each in yaml.safe_load_all(KUBERNETES.read_text())}


def pod() -> Any:
    return objects()["Deployment"]["spec"]["template"]["spec"]


def service() -> Any:
    return yaml.safe_load(COMPOSE.read_text())["services"]["vllm"]


def test_both_start_vllm_as_the_exported_script_does():
    [container] = pod()["containers"]
    assert " ".join(COMMAND) in SCRIPT_TEXT
    assert container["command"] == service()["entrypoint"] == COMMAND
    assert container["args"] == service()["command"] == ARGUMENTS
    assert container["image"] == service()["image"]
    assert container["workingDir"] == service()["working_dir"] == "/served"


def test_the_key_is_a_secret_and_the_root_is_read_only():
    [container] = pod()["containers"]
    key = next(each for each in container["env"] if each["name"] == "VLLM_API_KEY")
    assert set(key) == {"name", "valueFrom"} and "secretKeyRef" in key["valueFrom"]
    assert "VLLM_API_KEY" not in service()["environment"] and service()["env_file"]
    assert container["securityContext"]["readOnlyRootFilesystem"] and service()["read_only"]
    mounted = {each["mountPath"]: each for each in container["volumeMounts"]}
    assert mounted["/served"]["readOnly"] and {each["name"] for each in mounted.values()} == {
        each["name"] for each in pod()["volumes"]
    }
    assert service()["ports"][0].startswith("127.0.0.1:"), "not every interface of the machine"


def test_kubernetes_finds_the_pod_by_its_labels_and_asks_whether_it_is_healthy():
    deployment, found = objects()["Deployment"]["spec"], objects()["Service"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert deployment["selector"]["matchLabels"] == found["selector"] == labels
    [container] = pod()["containers"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}
    assert container["ports"][0]["name"] == found["ports"][0]["targetPort"] == "http"
    assert container["resources"]["limits"]["nvidia.com/gpu"] and container["resources"]["limits"]["memory"]


def test_kubernetes_own_schemas_take_the_manifest():
    validator = pytest.importorskip("kubernetes_validate")
    for each in objects().values():
        validator.validate(each, validator.latest_version(), strict=True)
    wrong = deepcopy(objects()["Deployment"])
    wrong["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(validator.ValidationError):
        validator.validate(wrong, validator.latest_version(), strict=True)


def test_the_compose_specification_takes_the_file():
    compose = pytest.importorskip("compose_spec")
    compose.PyCompose.from_yaml(COMPOSE.read_text()).validate()
    with pytest.raises(ValueError, match="entrypont"):
        compose.PyCompose.from_yaml(COMPOSE.read_text().replace("entrypoint:", "entrypont:")).validate()
