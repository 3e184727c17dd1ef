# HydraMesh: `make` lists what there is.

SHELL := /bin/bash
CARGO ?= cargo
PYTHON ?= python3
# Every cargo call runs in rust/; the lock file decides the versions.
# It takes every core, whatever make's own -j is.
IN_RUST := cd rust && MAKEFLAGS=
SERVICES := -p mesh-head -p mesh-worker -p mesh-shim -p mesh-cli
# For the whole workspace, so that only what knows these features is compiled once more.
PROVIDERS := mesh-worker/cuda,mesh-worker/migraphx
# clippy is a compiler as well: it lints our crates while it compiles them for the tests, so that nothing is compiled twice.
LINTED := RUSTC_WORKSPACE_WRAPPER=clippy-driver CLIPPY_ARGS=-D__CLIPPY_HACKERY__warnings__CLIPPY_HACKERY__
# Workers with libtorch, and their tests.
IMAGES := mesh-worker/images,arcanum-tests/images
GPU ?= cuda
FUZZ_SECONDS ?= 60
CACHE := $(if $(HYDRAMESH_CACHE),$(HYDRAMESH_CACHE),$(CURDIR)/.cache)

export ORT_DYLIB_PATH ?= $(CACHE)/onnxruntime/libonnxruntime.so.1.24.4
# For mesh-engine-tch alone. Its programs and those of mesh-worker's feature `images` remember where the libraries are.
export LIBTORCH ?= $(CACHE)/libtorch
export LIBTORCH_CXX11_ABI ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo demo-image build test test-nix test-vm test-images test-gpu test-arm test-isa test-foreign flood soak soak-images attack bench bench-peers fuzz fetch fetch-deny fmt clean
# Exit code 3 of a test script: this machine cannot run it, and why was said.
WHERE_POSSIBLE := || [ $$? = 3 ]

help: ## Show this list
	@echo "HydraMesh. Start with 'make demo'."
	@echo
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS=$$'\t' read -r name text; do printf '  make %-12s %s\n' "$$name" "$$text"; done

demo: ## Start a mesh on this machine, ask a model that several workers hold, kill one, see the answer go on (KEEP=1 leaves it running)
	@$(PYTHON) scripts/fetch.py runtime model
	@$(IN_RUST) $(CARGO) build --release --locked --bins $(SERVICES)
	@exec rust/target/release/hydramesh demo --cache "$(CACHE)" $(if $(filter-out 0,$(KEEP)),--keep)

demo-image: ## Start a mesh that makes an image, kill its worker in the middle, see the image finished (MODEL names a Stable Diffusion; weights are random without)
	@$(PYTHON) scripts/fetch.py runtime libtorch clip
	@$(IN_RUST) $(CARGO) build --release --locked --bins --example random_diffusion $(SERVICES) -p mesh-diffusion --features mesh-worker/images,mesh-diffusion/synth
ifndef MODEL
	@rust/target/release/examples/random_diffusion demo "$(CACHE)/models/random-stable-diffusion"
	@install -D -m 644 -t "$(CACHE)/models/random-stable-diffusion/tokenizer" "$(CACHE)"/vocabs/clip/*
endif
	@exec rust/target/release/hydramesh demo --image --cache "$(CACHE)" $(if $(MODEL),--model "$(MODEL)")

build: ## Build the services and the command line (release) into rust/target/release
	$(IN_RUST) $(CARGO) build --release --locked --bins $(SERVICES)

test: ## Formatting, clippy with warnings denied, layers and dependencies of crates, every test
# Compilation needs libtorch's headers. Then one waits for the network and the other for the cores.
	@$(PYTHON) scripts/fetch.py libtorch
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=recurse prepared compiled
	$(IN_RUST) $(LINTED) $(CARGO) test --workspace --features $(PROVIDERS) --locked --test backend
	HYDRAMESH_BIN=$(CURDIR)/rust/target/debug scripts/test_vm.sh nspawn $(WHERE_POSSIBLE)
	HYDRAMESH_BIN_DIR=$(CURDIR)/rust/target/debug $(PYTHON) scripts/test_foreign.py promtool $(WHERE_POSSIBLE)
	$(LINTED) scripts/test_isa.sh --workspace $(WHERE_POSSIBLE)
	$(IN_RUST) $(LINTED) HYDRAMESH_BIN_DIR=$(CURDIR)/rust/target/debug $(CARGO) test --workspace --locked --no-fail-fast
# A worker with libtorch takes the other's place only here: containers and emulated CPUs above have no libtorch.
	$(IN_RUST) $(LINTED) HYDRAMESH_BIN_DIR=$(CURDIR)/rust/target/debug $(CARGO) test --workspace --features $(IMAGES) --locked --no-fail-fast --lib --test images --test worker image

.PHONY: prepared compiled checked
prepared: fetch
	scripts/fetch_nix_tools.sh
	scripts/test_nix.sh $(WHERE_POSSIBLE)
	scripts/test_shell.sh $(WHERE_POSSIBLE)

compiled: checked
# With the tests come the services, with the same dependencies: built by themselves they would have those compiled once more.
	$(IN_RUST) $(LINTED) $(CARGO) test --workspace --all-targets --locked --no-run

checked:
	$(PYTHON) scripts/check_dependencies.py
	$(PYTHON) scripts/check_security.py
	$(PYTHON) scripts/test_checks.py
	$(PYTHON) scripts/check_layers.py
	$(PYTHON) scripts/check_unused.py
	$(PYTHON) scripts/check_docs.py
	$(IN_RUST) $(CARGO) fmt --all --check

test-nix: ## All that is Nix, by evaluation: it parses, is formatted, its tests pass, its units score well; ShellCheck over every script
	scripts/fetch_nix_tools.sh
	scripts/test_nix.sh
	@$(PYTHON) scripts/fetch.py shellcheck
	scripts/test_shell.sh

test-vm: build fetch ## The module's units under a real systemd, in containers and in a QEMU guest, and the live image's there (needs root)
	scripts/test_vm.sh nspawn
	scripts/test_vm.sh nspawn --release sid $(WHERE_POSSIBLE)
	scripts/test_vm.sh qemu
	scripts/test_vm.sh iso

test-images: build fetch ## The images' configurations under podman (needs root)
	scripts/test_images.sh

test-gpu: fetch ## The graph for GPUs on this machine's GPU (GPU=cuda, migraphx or webgpu; ORT_DYLIB_PATH names an ONNX Runtime for it, ORT_WEBGPU_EP the plugin)
	$(IN_RUST) ORT_WEBGPU_EP="$${ORT_WEBGPU_EP:-$(CACHE)/onnxruntime/webgpu/libonnxruntime_providers_webgpu.so}" HYDRAMESH_TEST_GPU=$(GPU) $(CARGO) test -p mesh-engine-ort $(if $(filter-out webgpu,$(GPU)),--features $(GPU)) --locked --no-fail-fast --test conformance --test device --test backend --test smollm2_device

test-arm: ## The kernels' tests for aarch64, emulated
	scripts/test_arm.sh

test-isa: ## The kernels' tests on older x86-64 CPUs, emulated
	scripts/test_isa.sh

test-foreign: fetch ## The server tests of llama.cpp and vLLM, client libraries, schemathesis and promtool against a mesh
	$(IN_RUST) $(CARGO) build --locked --bins $(SERVICES)
	HYDRAMESH_BIN_DIR=$(CURDIR)/rust/target/debug $(PYTHON) scripts/test_foreign.py $(FOREIGN)

flood: fetch ## 10 million random and mutated datagrams at each UDP port, memory watched (the short run is in make test)
	$(IN_RUST) $(CARGO) build --release --locked --bins $(SERVICES)
	$(IN_RUST) HYDRAMESH_FLOOD_DATAGRAMS=10000000 $(CARGO) test --release --locked -p arcanum-tests --test flood -- --nocapture

soak: fetch ## Rings: workers lost by the hundred, a storm of faults, how long clients wait (SOAK='--kills 20 --storm 60' shortens it)
	$(IN_RUST) $(CARGO) build --release --locked --bins $(SERVICES) -p arcanum-tests
	$(IN_RUST) target/release/arcanum-soak $(SOAK)

soak-images: fetch ## Images: workers killed after every step, and the cost of an image beside text (SOAK='--images 1 --beside 3' shortens it)
	@$(PYTHON) scripts/fetch.py libtorch
	$(IN_RUST) $(CARGO) build --release --locked --bins $(SERVICES) -p arcanum-tests --features $(IMAGES)
	$(IN_RUST) target/release/arcanum-soak --kills 0 --silences 0 --storm 0 --load 0 --pauses 0 --pairs 0 $(SOAK)

attack: fetch ## All attacks at once for 5 minutes beside 8 honest clients (ATTACK='--each 40' shows which one it is)
	$(IN_RUST) $(CARGO) build --release --locked --bins $(SERVICES) -p arcanum-tests
	$(IN_RUST) target/release/arcanum-attack $(ATTACK)

bench: ## Benchmarks of our own, each a ratio measured in one run
	@$(PYTHON) scripts/fetch.py runtime model
	$(IN_RUST) $(CARGO) build --release --locked --bins $(SERVICES)
	$(IN_RUST) $(CARGO) build --release --locked -p mesh-bench
	$(IN_RUST) $(CARGO) bench --locked -p mesh-bench --benches --no-run
	CARGO=$(CARGO) scripts/bench.sh

bench-peers: ## The same against llama.cpp and sentence-transformers, which it fetches
	@$(PYTHON) scripts/fetch.py runtime model embeddings
	$(IN_RUST) $(CARGO) build --release --locked --bins $(SERVICES)
	scripts/bench_peers.sh

fuzz: ## Every fuzz target for FUZZ_SECONDS (60) seconds
	FUZZ_SECONDS=$(FUZZ_SECONDS) scripts/fuzz.sh

fetch: ## Fetch what is missing into the cache: ONNX Runtime, libtorch, the model, test data
	@$(PYTHON) scripts/fetch.py

fetch-deny: ## Build cargo-deny into the cache, for make test and for advisories (some minutes, once)
	$(CARGO) install --quiet --locked --root "$(CACHE)/cargo-deny" --version 0.20.2 cargo-deny

fmt: ## Format the code
	$(IN_RUST) $(CARGO) fmt --all

clean: ## Remove what was built (the cache stays)
	$(IN_RUST) $(CARGO) clean
	rm -rf rust/fuzz/target
