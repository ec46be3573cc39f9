{{- define "budgetformer.name" -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 52 | trimSuffix "-" -}}
{{- end -}}

{{- define "budgetformer.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "budgetformer.labels" -}}
{{ include "budgetformer.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "budgetformer.image" -}}
{{ printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) }}
{{- end -}}

{{- define "budgetformer.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "budgetformer.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* Variables of the settings; `port` and `host` are the chart's own. */}}
{{- define "budgetformer.environment" -}}
{{- range $name, $value := .Values.settings }}
- name: BUDGETFORMER_{{ $name | upper }}
  value: {{ kindIs "string" $value | ternary $value (toJson $value) | quote }}
{{- end }}
- name: BUDGETFORMER_DRAIN_SECONDS
  value: {{ .Values.drainSeconds | quote }}
- name: BUDGETFORMER_ALLOW_ANONYMOUS
  value: {{ .Values.access.allowAnonymous | quote }}
{{- if .Values.access.keysSecret }}
- name: BUDGETFORMER_KEYS_FILE
  value: /run/secrets/keys/keys.toml
{{- end }}
{{- if .Values.access.adminKeySecret }}
- name: BUDGETFORMER_ADMIN_KEY_FILE
  value: /run/secrets/admin/admin_key
{{- end }}
{{- if eq .Values.mode "deployment" }}
- name: BUDGETFORMER_STATE_DIR
  value: /state
{{- end }}
{{- if .Values.models.remoteStore }}
- name: BUDGETFORMER_REMOTE_STORE
  value: {{ .Values.models.remoteStore | quote }}
{{- end }}
{{- end -}}

{{- define "budgetformer.mounts" -}}
- name: tmp
  mountPath: /tmp
{{- if and .Values.state.enabled (eq .Values.mode "deployment") }}
- name: state
  mountPath: /state
{{- end }}
{{- if .Values.access.keysSecret }}
- name: keys
  mountPath: /run/secrets/keys
  readOnly: true
{{- end }}
{{- if .Values.access.adminKeySecret }}
- name: admin
  mountPath: /run/secrets/admin
  readOnly: true
{{- end }}
{{- if or .Values.models.claim .Values.models.remoteStore }}
- name: models
  mountPath: /models
  readOnly: {{ not .Values.models.remoteStore }}
{{- end }}
{{- end -}}

{{- define "budgetformer.volumes" -}}
- name: tmp
  emptyDir:
    sizeLimit: 256Mi
{{- if and .Values.state.enabled (eq .Values.mode "deployment") }}
- name: state
  {{- if .Values.state.claim }}
  persistentVolumeClaim:
    claimName: {{ .Values.state.claim }}
  {{- else }}
  emptyDir:
    sizeLimit: {{ .Values.state.size }}
  {{- end }}
{{- end }}
{{- if .Values.access.keysSecret }}
- name: keys
  secret:
    secretName: {{ .Values.access.keysSecret }}
    defaultMode: 0440
{{- end }}
{{- if .Values.access.adminKeySecret }}
- name: admin
  secret:
    secretName: {{ .Values.access.adminKeySecret }}
    defaultMode: 0440
{{- end }}
{{- if .Values.models.claim }}
- name: models
  persistentVolumeClaim:
    claimName: {{ .Values.models.claim }}
    readOnly: {{ not .Values.models.remoteStore }}
{{- else if .Values.models.remoteStore }}
- name: models
  emptyDir:
    sizeLimit: {{ .Values.models.remoteStoreSize }}
{{- end }}
{{- end -}}
