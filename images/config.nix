# The OCI configuration of one image, as a function of paths: the same values serve the image built from nixpkgs and the test that
# runs our programs under podman on another distribution.
{
  # "head", "shim" or "worker"
  role,
  # "cpu", "images", "nvidia" or "rocm"; only workers differ
  backend ? "cpu",
  version,
  # Paths inside of the image.
  bin,
  tini,
  caBundle,
  ortLibrary ? null,
}:
let
  stateDir = "/var/lib/hydramesh";
  seconds = count: count * 1000000000;

  roles = {
    head = {
      title = "HydraMesh head";
      description = "Knows the workers of a mesh and gives them the requests that arrive over HTTP (OpenAI API) and DCF/UDP";
      # HTTP stays on loopback, as everywhere: an image cannot know whether a stranger can reach its port. Whoever publishes it
      # sets HYDRAMESH_HEAD__HTTP__LISTEN=0.0.0.0:8080 together with HYDRAMESH_HEAD__HTTP__API_KEYS_FILE; without keys the head
      # refuses to start like that.
      env = [ "HYDRAMESH_HEAD__STATE_DIR=${stateDir}/head" ];
      ports = [
        "7777/udp"
        "7778/udp"
        "7780/udp"
        "8080/tcp"
      ];
    };

    shim = {
      title = "HydraMesh shim";
      description = "Takes DCF/UDP clients in and hands their tasks to a live head of a mesh";
      # The shim has no state and no HTTP by default; its health check needs both.
      env = [
        "HYDRAMESH_SHIM__STATE_DIR=${stateDir}/shim"
        "HYDRAMESH_SHIM__HTTP__LISTEN=127.0.0.1:8082"
      ];
      ports = [ "9999/udp" ];
    };

    worker = {
      title = "HydraMesh worker (${backend})";
      description = "Loads models and answers what the head of a mesh gives it";
      env = [
        "HYDRAMESH_WORKER__STATE_DIR=${stateDir}/worker"
        # Read-only folders with models are mounted here.
        ''HYDRAMESH_WORKER__MODEL_DIRS=["${stateDir}/models"]''
        "ORT_DYLIB_PATH=${ortLibrary}"
      ]
      ++ backendEnv.${backend};
      # A worker dials its head; what it listens on is for v5.0.0 heads, for the other workers of a model that it holds a part
      # of (HYDRAMESH_WORKER__RING__MODELS), and on loopback for health.
      ports = [
        "7779/udp"
        "7781/udp"
      ];
    };
  };

  backendEnv = {
    cpu = [ ];
    images = [ ];
    # The container runtime reads the first two, and mounts the driver's libraries into one of the folders of the third.
    nvidia = [
      "NVIDIA_VISIBLE_DEVICES=all"
      "NVIDIA_DRIVER_CAPABILITIES=compute,utility"
      "LD_LIBRARY_PATH=/usr/lib64:/usr/lib/x86_64-linux-gnu:/run/opengl-driver/lib"
    ];
    # ROCm's userland is in the image; the devices are given with --device /dev/kfd --device /dev/dri.
    rocm = [ ];
  };

  settings = roles.${role};
in
{
  # The number, not the name: Kubernetes' runAsNonRoot can only judge numbers.
  User = "10001:10001";
  WorkingDir = stateDir;
  # tini passes signals on and reaps; arguments of `podman run` go to the service.
  Entrypoint = [
    tini
    "--"
    bin
  ];
  Env = settings.env ++ [
    # So that `podman exec head mesh-head token create` and Kubernetes' probes need no store path.
    "PATH=/bin"
    "SSL_CERT_FILE=${caBundle}"
    "HOME=${stateDir}"
  ];
  Volumes.${stateDir} = { };
  ExposedPorts = builtins.listToAttrs (
    map (name: {
      inherit name;
      value = { };
    }) settings.ports
  );
  StopSignal = "SIGTERM";
  # The service's own subcommand: neither curl nor a shell is needed.
  Healthcheck = {
    Test = [
      "CMD"
      bin
      "health"
    ];
    Interval = seconds 30;
    Timeout = seconds 10;
    StartPeriod = seconds 20;
    Retries = 3;
  };
  Labels = {
    "org.opencontainers.image.title" = settings.title;
    "org.opencontainers.image.description" = settings.description;
    "org.opencontainers.image.version" = version;
    "org.opencontainers.image.licenses" = "BSD-3-Clause";
    "org.opencontainers.image.vendor" = "HydraMesh";
  };
}
