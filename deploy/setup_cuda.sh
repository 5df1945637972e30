# Sourced by deploy/setup for --cuda: what the GPU plugin is built with, below .deps/cuda. Needs no GPU and no driver; 0.9 GB.
# nvcc and its headers, cuDNN and NCCL (headers and libraries of the versions that torch 2.11.0 pins), cudnn-frontend (headers).

cuda=(
  nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-cccl==13.0.85 nvidia-cuda-runtime==13.0.96
  nvidia-cuda-nvrtc==13.0.88
  nvidia-cudnn-cu13==9.19.0.56 nvidia-nccl-cu13==2.28.9 nvidia-cudnn-frontend==1.32.0
)

install_cuda() { install_python "$deps/cuda" --no-deps "${cuda[@]}"; }
