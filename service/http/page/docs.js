// Shows the OpenAPI document with Swagger UI, from this server alone.

window.SwaggerUIBundle({
  url: new URL("../openapi.json", import.meta.url).href,
  dom_id: "#docs",
  deepLinking: true,
  validatorUrl: null, // it would send the document to a server elsewhere
});
