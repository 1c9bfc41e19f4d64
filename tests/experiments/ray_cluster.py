"""A Ray cluster of one machine in a process of its own: prints its address, and ends with its standard input."""

import os
import sys

from ray.cluster_utils import Cluster

from dopr_lightning.experiments.sweep.ray_engine import ENVIRONMENT

HEAD = {"num_cpus": 2, "num_gpus": 1, "include_dashboard": False}  # Ray counts GPUs, and takes our word for them

if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    cluster = Cluster(initialize_head=True, head_node_args=HEAD)
    print(cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()
