# `make help` lists the targets. Variables given on the command line (NAME=, KEY=, …) are passed on, nothing else is.
SHELL := /bin/sh
PYTHON ?= $(firstword $(foreach name,python3 python3.14 python3.13 python3.12 python3.11,$(shell \
	command -v $(name) >/dev/null 2>&1 && $(name) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(name))))
BIN := .venv/bin
GATEWAY := $(BIN)/python -m gateway
COMPOSE := docker compose
option = $(if $(filter command,$(firstword $(origin $(1)))),$(if $(value $(1)),--$(2) "$$$(1)"))
flag = $(if $(filter command,$(firstword $(origin $(1)))),$(if $(filter-out 0 false no,$(value $(1))),--$(2)))
given = $(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(name)))
only = $(if $(filter-out $(1) $(OF_LIMITS) JSON PYTHON BIN GATEWAY COMPOSE SHELL,$(given)),$(error `make $@` takes no $(filter-out $(1) $(OF_LIMITS) JSON PYTHON BIN GATEWAY COMPOSE SHELL,$(given)): see `make help`))
OF_LIMITS := RPM TPM CONCURRENT DAY MONTH DAY_SECONDS MONTH_SECONDS WEIGHT HEARTBEAT_AFTER_S
LIMITS = $(call option,RPM,rpm) $(call option,TPM,tpm) $(call option,CONCURRENT,concurrent) $(call option,DAY,day) $(call option,MONTH,month) $(call option,DAY_SECONDS,day-seconds) $(call option,MONTH_SECONDS,month-seconds) $(call option,WEIGHT,weight) $(call option,HEARTBEAT_AFTER_S,heartbeat-after-s)
JSON_FLAG = $(call flag,JSON,json)
CSV_FLAG = $(call flag,CSV,csv)

.DEFAULT_GOAL := help
.PHONY: help run test bench bench-fleet profile check key keys limit rotate revoke models refresh probe warm unload pull doctor drill explain top trace drain undrain audit usage audit-verify purge forget migrate psql config up down logs image lock clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: .venv/ready-to-run ## Serve on this machine, with private stores, a backend and a key to paste
	@exec $(GATEWAY) run

test: .venv/ready-to-test ## Run all tests against private servers
	@PYTHONDONTWRITEBYTECODE= PYTHONPYCACHEPREFIX="$(CURDIR)/.pytest_cache/bytecode" $(BIN)/python -m pytest -n auto $(TESTS)

bench: .venv/ready-to-test ## Measure the speed against plain proxies, and nginx if installed [LITELLM=its python]
	@$(BIN)/python -m tests.bench $(if $(LITELLM),--litellm $(LITELLM))

bench-fleet: .venv/ready-to-test ## Compare the routing with that of others on simulated machines: [SCENARIO=office,homelab RULES=warm,gateway-fast ROUNDS=1 SPEED=20]
	@$(BIN)/python -m tests.bench.fleet $(call option,SCENARIO,scenario) $(call option,RULES,rules) $(call option,ROUNDS,rounds) $(call option,SPEED,speed) $(if $(SCENARIO)$(RULES),,--json tests/bench/results/fleet.json --svg tests/bench/results/fleet.svg)

profile: .venv/ready-to-test ## Show where the time of a request and of a chunk goes, by parts of the code and by functions
	@$(BIN)/python -m tests.bench.profile

check: .venv/ready-to-test ## Check lint, format, types, security and known vulnerabilities
	$(BIN)/ruff check gateway tests
	$(BIN)/ruff format --check gateway tests
	$(BIN)/mypy
	$(BIN)/bandit -q --ini setup.cfg -r gateway
	@$(BIN)/python -m tests.support.audit_dependencies

key: .venv/ready-to-run ## Create a key: NAME= [MODELS="a b*"] [EXPIRES=30d] [RPM= TPM= CONCURRENT= DAY= MONTH= DAY_SECONDS= MONTH_SECONDS=] [WEIGHT=1 HEARTBEAT_AFTER_S=] [PROMPT_LOG=1 RETENTION=7d] [AUDIT_RETENTION=90d] [ROLE=admin] [ADMIN_MODELS=1 SHOW_BACKEND=1 SHOW_OVERHEAD=1 KEEP_VOLATILE_LINES=1 BATCH=1 SUB_USERS=1]
	@$(call only,NAME MODELS EXPIRES PROMPT_LOG RETENTION AUDIT_RETENTION ROLE ADMIN_MODELS SHOW_BACKEND SHOW_OVERHEAD KEEP_VOLATILE_LINES BATCH SUB_USERS)
	@$(GATEWAY) key $(call option,NAME,name) $(call option,MODELS,models) $(call option,EXPIRES,expires) $(LIMITS) $(call flag,PROMPT_LOG,prompt-log) $(call option,RETENTION,retention) $(call option,AUDIT_RETENTION,audit-retention) $(call option,ROLE,role) $(call flag,ADMIN_MODELS,admin-models) $(call flag,SHOW_BACKEND,show-backend) $(call flag,SHOW_OVERHEAD,show-overhead) $(call flag,KEEP_VOLATILE_LINES,keep-volatile-lines) $(call flag,BATCH,batch) $(call flag,SUB_USERS,sub-users) $(JSON_FLAG)

limit: .venv/ready-to-run ## Set a key's limits: KEY= [MODEL="a*"] RPM= TPM= CONCURRENT= DAY= MONTH= DAY_SECONDS= MONTH_SECONDS= (a number, unlimited or unset) WEIGHT= HEARTBEAT_AFTER_S=
	@$(call only,KEY MODEL)
	@$(GATEWAY) limit $(call option,KEY,key) $(call option,MODEL,model) $(LIMITS) $(JSON_FLAG)

keys: .venv/ready-to-run ## List all keys
	@$(GATEWAY) keys $(JSON_FLAG)

rotate: .venv/ready-to-run ## Give a key a new secret: KEY= [OVERLAP=24h]
	@$(GATEWAY) rotate $(call option,KEY,key) $(call option,OVERLAP,overlap) $(JSON_FLAG)

revoke: .venv/ready-to-run ## Revoke a key, everywhere at once: KEY=
	@$(GATEWAY) revoke $(call option,KEY,key) $(JSON_FLAG)

models: .venv/ready-to-run ## List the models of all backends
	@$(GATEWAY) models $(JSON_FLAG)

refresh: .venv/ready-to-run ## Poll all backends for their models now
	@$(GATEWAY) refresh $(JSON_FLAG)

probe: .venv/ready-to-run ## Try every backend: reachable, latency, version, models, token
	@$(GATEWAY) probe $(JSON_FLAG)

warm: .venv/ready-to-run ## Load a model into a backend's memory: MODEL= [BACKEND=, else where its calls go first]
	@$(GATEWAY) warm $(call option,MODEL,model) $(call option,BACKEND,backend) $(JSON_FLAG)

unload: .venv/ready-to-run ## Throw a model out of a backend's memory: MODEL= [BACKEND=, else of all that have it loaded]
	@$(GATEWAY) unload $(call option,MODEL,model) $(call option,BACKEND,backend) $(JSON_FLAG)

pull: .venv/ready-to-run ## Download a model on all Ollama backends at once: MODEL= [BACKENDS=alpha,beta]
	@$(GATEWAY) pull $(call option,MODEL,model) $(call option,BACKENDS,backends) $(JSON_FLAG)

doctor: .venv/ready-to-run ## Check the whole installation: what is fine, what is not, what to do
	@$(GATEWAY) doctor $(JSON_FLAG)

drill: .venv/ready-to-run ## Break things on fake backends beside this installation, and report what held: [ONLY="redis revoke"]
	@$(GATEWAY) drill $(call option,ONLY,only) $(JSON_FLAG)

explain: .venv/ready-to-run ## Show where a call would be sent now, when, and why: KEY= MODEL= [CLIENT=openai, ollama, anthropic, responses or a route] [PROMPT= OUTPUT= tokens]
	@$(GATEWAY) explain $(call option,KEY,key) $(call option,MODEL,model) $(call option,CLIENT,client) $(call option,PROMPT,prompt) $(call option,OUTPUT,output) $(JSON_FLAG)

top: .venv/ready-to-run ## Watch the installation in the terminal, with an admin key from the environment (ADMIN_KEY) or typed in: [URL=http://host:8080] [ONCE=1]
	@ADMIN_KEY="$$ADMIN_KEY" $(GATEWAY) top $(call option,URL,url) $(call flag,ONCE,once) $(JSON_FLAG)

trace: .venv/ready-to-run ## Show what happened to one request: ID= [SINCE=24h]
	@$(GATEWAY) trace $(call option,ID,id) $(call option,SINCE,since) $(JSON_FLAG)

drain: .venv/ready-to-run ## Stop sending new requests to a backend, in every process: BACKEND=
	@$(GATEWAY) drain $(call option,BACKEND,backend) $(JSON_FLAG)

undrain: .venv/ready-to-run ## Resume sending requests to a backend: BACKEND=
	@$(GATEWAY) undrain $(call option,BACKEND,backend) $(JSON_FLAG)

audit: .venv/ready-to-run ## List requests, the newest first: [KEY= MODEL="a*" SINCE=24h STATUS=4xx OUTCOME= LIMIT=] [CSV=1]
	@$(GATEWAY) audit $(call option,KEY,key) $(call option,MODEL,model) $(call option,SINCE,since) $(call option,STATUS,status) $(call option,OUTCOME,outcome) $(call option,LIMIT,limit) $(JSON_FLAG) $(CSV_FLAG)

usage: .venv/ready-to-run ## Sum requests and tokens: [BY=key,model,answered_as,backend,day] [SINCE=30d] [CSV=1]
	@$(GATEWAY) usage $(call option,BY,by) $(call option,SINCE,since) $(JSON_FLAG) $(CSV_FLAG)

audit-verify: .venv/ready-to-run ## Check that the audit has not been changed
	@$(GATEWAY) audit-verify $(JSON_FLAG)

purge: .venv/ready-to-run ## Delete expired audit rows and prompts now
	@$(GATEWAY) purge $(JSON_FLAG)

forget: .venv/ready-to-run ## Delete a key's prompts and answers now: KEY=
	@$(GATEWAY) forget $(call option,KEY,key) $(JSON_FLAG)

migrate: .venv/ready-to-run ## Bring the database's schema up to date
	@$(GATEWAY) migrate $(JSON_FLAG)

psql: .venv/ready-to-run ## Open the database's own shell
	@$(GATEWAY) psql

config: .venv/ready-to-run ## Print the settings in force and where each comes from
	@$(GATEWAY) config $(JSON_FLAG)

up: ## Start the containers (after `cp .env.example .env` and editing it)
	$(COMPOSE) up --detach --build --wait

down: ## Stop the containers; volumes are kept
	$(COMPOSE) down

logs: ## Follow the gateway's log
	$(COMPOSE) logs --follow --tail 100 gateway

image: ## Build the container image
	docker build --tag neuronetz-gateway .

lock: .venv/made ## Pin the dependencies of setup.cfg again, with hashes
	$(BIN)/python -m pip install -q uv
	$(BIN)/python -m tests.support.lock_dependencies

clean: ## Remove the virtual environment and caches; data and keys are kept
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
	@$(if $(wildcard .local),echo "kept the local run's data in .local")
	@ls -d /var/lib/neuronetz-gateway/$(notdir $(CURDIR))-* 2>/dev/null | sed "s/^/kept the local run's data in /" || true

# Debian without python3-venv has no ensurepip: then the system's pip fills the environment.
.venv/made:
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed; set PYTHON=/path/to/python3"; exit 1; }
	@echo "creating .venv with $(PYTHON)"
	@$(PYTHON) -m venv --clear .venv 2>/dev/null || $(PYTHON) -m venv --clear --without-pip .venv
	@touch $@

.venv/ready-to-run: .venv/made gateway/requirements-local.txt
	@echo "installing the pinned dependencies (a minute, the first time)"
	@$(call install,gateway/requirements-local.txt)
	@touch $@

.venv/ready-to-test: .venv/made tests/requirements.txt
	@echo "installing the pinned dependencies and the test tools (some minutes, the first time)"
	@$(call install,tests/requirements.txt)
	@touch $@ .venv/ready-to-run

install = if $(BIN)/python -m pip --version >/dev/null 2>&1; then pip="$(BIN)/python -m pip"; else pip="$(PYTHON) -m pip --python $(BIN)/python"; fi; $$pip install -q --disable-pip-version-check --no-compile --require-hashes --no-deps -r $(1)
