# Sourced by the scripts that run tests: nothing is looked up on the network, and each process has one thread.
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
