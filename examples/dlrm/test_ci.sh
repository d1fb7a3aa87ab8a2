#!/bin/bash
# A short run of everything: real purchases with the cache, on one process and two, resident, uncached; a synthetic stream.
# Needs colossal_freqcache and requirements.txt installed, and their environment's bin on PATH.
set -xe
cd "$(dirname "$0")"

pip install -r requirements.txt

colossalai run --nproc_per_node 1 train.py --config configs/purchases.py --steps 20
colossalai run --nproc_per_node 2 train.py --config configs/purchases.py --steps 20
python train.py --config configs/purchases.py --steps 20 --cache-ratio 1.0
python train.py --config configs/purchases.py --steps 20 --uncached
colossalai run --nproc_per_node 1 train.py --config configs/synthetic_kaggle.py --steps 20
python data.py --synthetic kaggle --draws 200000
