# The three lines that README.md shows.
{
  services.hydramesh.enable = true;
  services.hydramesh.role = "head";
  services.hydramesh.openFirewall = true;
}
