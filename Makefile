# make test: sets up .venv and passes the tests. make lint: ruff only. make clean: forgets the setup.
# make demo: trains a small model on Python's own source text, exports it, and lets the artifact write (demo-out/).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.setup
# The versions of constraints.txt. Where pip's index has CPU builds of torch (PIP_INDEX_URL), they are enough here.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: setup test lint format demo clean

setup: $(SETUP)

$(SETUP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch triton numpy 'setuptools>=77'
	$(PIP) --no-build-isolation -e '.[dev]'
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu"

DEMO := demo-out
DEMO_TRAIN ?= --steps 320 --batch-size 8 --seq-len 256 --lr 4e-3
DEMO_SAMPLE ?= --prompt 'def read_text(self, path' --max-new-tokens 400 --temperature 0.8 --seed 0
# The draws of ONNX files are not torch's, so their texts are compared at temperature 0.
DEMO_GREEDY ?= --prompt 'def read_text(self, path' --max-new-tokens 200 --temperature 0
DEMO_ONNX ?= portable ort onnx27

# Threads that sleep while they wait cost nothing on free cores and much less on busy ones.
demo: export OMP_WAIT_POLICY := PASSIVE
demo: setup
	rm -rf $(DEMO)
	$(BIN)/gdn doctor
	$(BIN)/gdn train --preset tiny $(DEMO_TRAIN) --out $(DEMO)/model
	$(BIN)/gdn export $(DEMO)/model --target aoti --out $(DEMO)/aoti > $(DEMO)/table.txt
	$(BIN)/gdn generate $(DEMO)/model $(DEMO_SAMPLE) > $(DEMO)/sample-eager.txt
	$(BIN)/gdn generate $(DEMO)/aoti $(DEMO_SAMPLE) > $(DEMO)/sample-aoti.txt
	cmp $(DEMO)/sample-eager.txt $(DEMO)/sample-aoti.txt
	$(BIN)/gdn generate $(DEMO)/model $(DEMO_GREEDY) > $(DEMO)/greedy-eager.txt
	set -ex; for target in $(DEMO_ONNX); do \
		$(BIN)/gdn export $(DEMO)/model --target $$target --out $(DEMO)/$$target >> $(DEMO)/table.txt; \
		$(BIN)/gdn generate $(DEMO)/$$target/model.onnx $(DEMO_GREEDY) > $(DEMO)/greedy-$$target.txt; \
		cmp $(DEMO)/greedy-eager.txt $(DEMO)/greedy-$$target.txt; \
	done
	@echo; cat $(DEMO)/table.txt
	@echo; echo 'sample, the same from eager and from the package:'; echo
	@cat $(DEMO)/sample-aoti.txt

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(DEMO) build *.egg-info .pytest_cache .ruff_cache
